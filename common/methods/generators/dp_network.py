"""What private training of any network shares: features, one clipped and noised sum a step, and Adam on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from common.generator.tape import GradientFactors, Tape
from common.methods.base import RunContext, StepInput, Tensors
from common.methods.heads.linear import CENTRE, feature_scale
from common.privacy.clipping import clipped_gradient_sum
from common.privacy.noise import NoiseSource, add_gaussian
from common.privacy.sampling import SiteData, UnitBatch, by_unit, on_sphere
from common.privacy.statistics import clip_to_ball

Losses = Callable[[Tape, UnitBatch, NoiseSource], Tensor]


def network_data(context: RunContext, work: StepInput) -> SiteData:
    """A site's records by unit, with coordinates of about 1: on the sphere, centred, clipped; row by row."""
    training = context.config.training
    data = by_unit(work.data, context.config.privacy.unit, context.problem.num_classes)
    rows = on_sphere(data.embeddings) if training.sphere else data.embeddings
    rows = clip_to_ball(rows - work.params[CENTRE], training.feature_norm)
    return replace(data, embeddings=rows * feature_scale(context, rows.shape[-1]))


def noised_gradient_sum(
    context: RunContext, params: Tensors, batch: UnitBatch, losses: Losses, source: NoiseSource
) -> dict[str, Tensor]:
    """Clip every unit's gradient of all parameters as one vector, add up, add noise.

    Args:
        context: the run; clip norm C and noise multiplier σ.
        params: every parameter that is trained on records, by name.
        batch: the units drawn; may be none.
        losses: (tape, batch, source) -> (U,), one loss a unit that depends on its own records alone.
        source: secret randomness.

    Returns:
        The noised sum, by parameter: one Gaussian release with standard deviation σ C, for adding or removing one
        unit.
    """
    factors = GradientFactors()
    if batch.labels.shape[0] > 0:
        tape = Tape(params, None, batch.labels.shape[0])
        factors = tape.factors(losses(tape, batch, source))
    shapes = {name: value.shape for name, value in params.items()}
    summed = clipped_gradient_sum(factors, shapes, context.config.privacy.clip_norm)
    noise = context.plan.training_noise or 0.0
    return add_gaussian(summed.tensors, noise * summed.sensitivity if noise > 0 else 0.0, source)


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
    return torch.as_tensor(source.gaussian(shape, 1.0), dtype=torch.float32)
