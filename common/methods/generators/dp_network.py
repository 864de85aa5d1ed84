"""What private training of any network shares: features, one clipped and noised sum a step, and Adam on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from common.devices import sent_to
from common.generator.tape import Tape
from common.methods.base import RunContext, Tensors
from common.privacy.ahead import drawn_ahead, numbers_in
from common.privacy.clipping import clipped_gradient_sum
from common.privacy.factors import GradientFactors
from common.privacy.mechanism import noise_std, noised_sum
from common.privacy.noise import NoiseSource
from common.records import UnitBatch

Losses = Callable[[Tape, UnitBatch, NoiseSource], Tensor]


def noised_gradient_sum(
    context: RunContext, params: Tensors, batch: UnitBatch, losses: Losses, source: NoiseSource, draws: int = 0
) -> dict[str, Tensor]:
    """Clip every unit's gradient of all parameters as one vector, add up, add noise.

    Args:
        context: the run; clip norm C and noise multiplier σ.
        params: every parameter that is trained on records, by name.
        batch: the units drawn; may be none.
        losses: (tape, batch, source) -> (U,), one loss a unit that depends on its own records alone.
        source: secret randomness.
        draws: standard normals that `losses` draws for each record, before anything else.

    Returns:
        The noised sum, by parameter: one Gaussian release with standard deviation σ C, for adding or removing one
        unit.

    Raises:
        ConfigError: the plan names no noise.
    """
    shapes = {name: value.shape for name, value in params.items()}
    clip_norm, sigma = context.config.privacy.clip_norm, context.plan.training_noise
    planned = (draws * batch.mask.numel(), 1.0), (numbers_in(shapes), noise_std(sigma, clip_norm))
    with drawn_ahead(source, batch.embeddings.device, planned) as drawn:
        factors = GradientFactors()
        if batch.labels.shape[0] > 0:
            tape = Tape(params, None, batch.labels.shape[0])
            factors = tape.factors(losses(tape, batch, drawn))
        return noised_sum(clipped_gradient_sum(factors, shapes, clip_norm), sigma, drawn)


def with_prefix(tensors: Tensors, *prefixes: str) -> dict[str, Tensor]:
    """The tensors whose names start with one of the prefixes."""
    return {name: value for name, value in tensors.items() if name.startswith(prefixes)}


def init_layers(sizes: Mapping[str, tuple[int, int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Weights and biases of linear layers, uniform within ±1/√inputs as torch's own: name -> (inputs, outputs)."""
    params: dict[str, Tensor] = {}
    for name, (inputs, outputs) in sizes.items():
        bound = 1.0 / math.sqrt(inputs)
        params[f"{name}.weight"] = (2 * torch.rand(outputs, inputs, generator=generator) - 1) * bound
        params[f"{name}.bias"] = (2 * torch.rand(outputs, generator=generator) - 1) * bound
    return params


def mean_of(uploads: Mapping[int, Tensors]) -> dict[str, Tensor]:
    """The plain average of the sites' tensors: no site tells how many records it has."""
    sites = sorted(uploads)
    return {name: torch.stack([uploads[site][name] for site in sites]).mean(0) for name in uploads[sites[0]]}


def normals(shape: tuple[int, ...], source: NoiseSource) -> Tensor:
    """Standard normal float32 values that meet records: from the secret source, so that no record's draw is known."""
    return sent_to(torch.get_default_device(), torch.from_numpy(source.gaussian(shape, 1.0)).float())
