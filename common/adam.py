"""Adam as a pure function. `torch.optim` would do, but its first step imports torch's compiler, which takes longer in a
site's fresh process than the whole round."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def adam_step(
    params: Tensors,
    gradients: Tensors,
    moments: Tensors,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of Adam as a pure function.

    Args:
        params: by name.
        gradients: by name; a parameter without one stays.
        moments: what the last step returned, or nothing at the start.
        rate: learning rate.
        betas: decay of the two moments.

    Returns:
        New parameters and moments: "adam.steps", and "adam.first." and "adam.second." before each name.

    Source: Kingma & Ba (2015), Algorithm 1, with ε = 1e-8.
    """
    after, kept = dict(params), dict(moments)
    # counted on the processor: a GPU would be waited for
    steps = float(kept.get("adam.steps", torch.zeros((), device="cpu"))) + 1.0
    kept["adam.steps"] = torch.tensor(steps, device="cpu")
    for name, gradient in gradients.items():
        first = betas[0] * kept.get(f"adam.first.{name}", torch.zeros_like(gradient)) + (1 - betas[0]) * gradient
        second = kept.get(f"adam.second.{name}", torch.zeros_like(gradient))
        second = betas[1] * second + (1 - betas[1]) * gradient.square()
        kept[f"adam.first.{name}"], kept[f"adam.second.{name}"] = first, second
        corrected = (second / (1 - betas[1] ** steps)).sqrt() + 1e-8
        after[name] = params[name] - rate / (1 - betas[0] ** steps) * first / corrected
    return after, kept
