"""Eq. 8 as printed, for `encoder-training` = `unprotected`: code and encoder move by raw gradients of records.

No guarantee is left then, and everything that the run writes says so. Imported only where a run asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.findings import label_vectors
from common.generator.layers import PlainLayers
from common.generator.objective import elbo
from common.methods.base import RunContext, Tensors
from common.methods.fedhypevae.rates import generator_shape
from common.privacy.factors import GradientFactors
from common.records import UnitBatch


def without_code(factors: GradientFactors) -> GradientFactors:
    """The factors of Φ alone: the code moves by its raw gradient."""
    factors.vectors.pop("code", None)
    return factors


def raw_gradients(
    context: RunContext,
    params: Tensors,
    code: Tensor | None,
    encoder: Tensors,
    batch: UnitBatch,
    draws: torch.Generator,
) -> dict[str, Tensor]:
    """Unclipped, unnoised gradients of code and encoder, by name; empty where nobody was drawn.

    Args:
        context: the run.
        params: Φ. code: (d_v,) or None. encoder: ψ.
        batch: the units drawn.
        draws: public numbers of the latent.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in encoder.items()}
    if code is not None:
        leaves["code"] = code.clone().requires_grad_()
    if not leaves or not bool(batch.mask.any()):
        return {}
    shape, code_leaf = generator_shape(context), leaves.get("code")
    keep = batch.mask.flatten() > 0
    embeddings = batch.embeddings.flatten(0, 1)[keep]
    one_hot = label_vectors(batch.labels.flatten(0, 1)[keep], shape.num_classes, torch.float32)

    def normals(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draws)

    layers = PlainLayers.at(params, code_leaf)
    loss = -elbo(shape, layers, PlainLayers(leaves), embeddings, one_hot, normals).mean() / shape.dim
    if code_leaf is not None:
        loss = loss + context.config.training.code_penalty * code_leaf.square().sum()
    # Eq. (8), the gradient of records as it is
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
