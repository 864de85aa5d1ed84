"""MH-pFedHN's hypernetwork: models of any size in chunks, from trainable embeddings, by one body and many heads.

    embedding.{name} (chunks, 64)            one row a chunk; a site's own, or a light global model's
    body.{0,1,2}.weight, .bias               shared by all
    head.{chunks}.weight (chunks, N, 128), head.{chunks}.bias (chunks, N)
                                             one head a chunk, shared by all models with so many chunks

Heads are found by the number of chunks and never by the order in which sites turn up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from common.config.rivals import RivalsConfig
from common.methods.base import Tensors
from common.methods.generators.dp_network import init_layers

_LAYERS = 3
# Heads start small beside torch's own scale: a generated model then starts near zero, where rectified layers still
# differ from each other but scores are even.
_HEAD_GAIN = 0.3


def chunks_of(size: int, settings: RivalsConfig) -> int:
    """Number of chunks of a model of `size` parameters."""
    return math.ceil(size / settings.chunk_size)


def init_chunks(sizes: Mapping[str, int], settings: RivalsConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """The whole hypernetwork for models by name and size; reads no data."""
    widths = [settings.chunk_embedding_dim, *[settings.body_width] * _LAYERS]
    layers = {f"body.{layer}": (widths[layer], widths[layer + 1]) for layer in range(_LAYERS)}
    params = init_layers(layers, generator)
    for chunks in sorted({chunks_of(size, settings) for size in sizes.values()}):
        bound = _HEAD_GAIN / math.sqrt(settings.body_width)
        shape = (chunks, settings.chunk_size, settings.body_width)
        params[f"head.{chunks}.weight"] = (2 * torch.rand(shape, generator=generator) - 1) * bound
        params[f"head.{chunks}.bias"] = torch.zeros(shape[:2])
    for name in sizes:
        params[f"embedding.{name}"] = init_embedding(sizes[name], settings, generator)
    return params


def init_embedding(size: int, settings: RivalsConfig, generator: torch.Generator) -> Tensor:
    """Embeddings of one model's chunks, standard normal: (chunks, 64)."""
    return torch.randn(chunks_of(size, settings), settings.chunk_embedding_dim, generator=generator)


def generate_model(params: Tensors, embedding: Tensor, size: int) -> Tensor:
    """The parameters of one model: embedding (chunks, 64) -> (size,), chunks put end to end and cut."""
    hidden = embedding
    for layer in range(_LAYERS):
        hidden = torch.relu(functional.linear(hidden, params[f"body.{layer}.weight"], params[f"body.{layer}.bias"]))
    chunks = embedding.shape[0]
    made = torch.einsum("cnw,cw->cn", params[f"head.{chunks}.weight"], hidden) + params[f"head.{chunks}.bias"]
    return made.flatten()[:size]


def pull_back(params: Tensors, sizes: Mapping[str, int], changes: Tensors) -> dict[str, Tensor]:
    """Vector-Jacobian product of the generated models with the changes that the sites ask for.

    Args:
        params: the hypernetwork, Φ.
        sizes: number of parameters of every model, by name.
        changes: Δ = θ - θ̃ by model, (size,): minus what local training moved.

    Returns:
        Gradients by name of everything in Φ that the changed models use; stepping against them moves θ towards θ̃.

    Source: Shamsian et al. (2021), Eq. 3; MH-pFedHN, arXiv 2507.22330.
    """
    used = {name for name in params if name.startswith("body.")}
    for name in changes:
        used |= {f"embedding.{name}", f"head.{params[f'embedding.{name}'].shape[0]}.weight"}
        used |= {f"head.{params[f'embedding.{name}'].shape[0]}.bias"}
    leaves = {name: params[name].detach().clone().requires_grad_() for name in sorted(used)}
    product = torch.zeros(())
    for name, change in changes.items():
        product = product + generate_model(leaves, leaves[f"embedding.{name}"], sizes[name]) @ change
    return dict(zip(leaves, torch.autograd.grad(product, list(leaves.values())), strict=True))


def clip_joint_norm(gradients: Tensors, bound: float) -> dict[str, Tensor]:
    """Gradients scaled down to a joint Euclidean norm of at most `bound`; for stability, not for privacy."""
    norm = math.sqrt(sum(float(value.square().sum()) for value in gradients.values()))
    return {name: value * min(1.0, bound / max(norm, 1e-12)) for name, value in gradients.items()}
