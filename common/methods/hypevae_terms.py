"""Public facts of a FedHypeVAE run that both sides compute alike: shapes, normalisation, rates, scales."""

from __future__ import annotations

import math

from torch import Tensor

from common.hypernetwork import GeneratorShape
from common.kernels import fourier_frequencies
from common.methods.base import RunContext, Tensors
from common.sampling import on_sphere
from common.statistics import clip_to_ball

CENTRE, TARGET, TOTAL = "constant.centre", "constant.target", "constant.total"


def generator_shape(context: RunContext) -> GeneratorShape:
    """Public sizes of the run's generator."""
    config = context.config
    return GeneratorShape.of(context.problem.dim, context.problem.num_classes, config.model, config.training)


def normalised(context: RunContext, embeddings: Tensor, centre: Tensor) -> Tensor:
    """Embeddings as the generator sees them: on the unit sphere, around the centre, clipped; row by row."""
    training = context.config.training
    if training.sphere:
        embeddings = on_sphere(embeddings)
    return clip_to_ball(embeddings - centre, training.feature_norm)


def trained_names(context: RunContext, params: Tensors) -> list[str]:
    """Names of Φ that records train; what gets no gradient gets no noise either."""
    training = context.config.training
    names = [name for name in params if not name.startswith("constant.")]
    if training.elbo_weight > 0 or training.mmd == "per-example":
        return names if training.discriminative_weight > 0 else [n for n in names if not n.startswith("class_")]
    output = generator_shape(context).output_layer
    kept = (f"{output}.class_weight", f"{output}.row_scale", "class_bias.", "class_shift.", "trunk.")
    return [name for name in names if name.startswith(kept)]


def rate_of(context: RunContext, name: str) -> float:
    """Learning rate of a parameter: class columns and scores have their own."""
    training = context.config.training
    scores = name.endswith(".class_weight") or name.startswith(("class_bias.", "class_shift."))
    return training.learning_rate if scores else training.generator_rate


def step_scale(context: RunContext, params: Tensors) -> float:
    """C q N / m: what a site's sum is divided by, from public and released numbers alone."""
    privacy, federation = context.config.privacy, context.config.federation
    total = known_total(params, federation.public_total)
    return clip_unit(context) * privacy.sampling_rate * max(total, 1.0) / context.problem.num_sites


def known_total(params: Tensors, public_total: int) -> float:
    """Units of all sites: as released with the statistics, else the public number."""
    return float(params[TOTAL]) if TOTAL in params else float(public_total)


def clip_unit(context: RunContext) -> float:
    """C, or 1 where nothing is clipped: rates act on gradients in units of it."""
    clip = context.config.privacy.clip_norm
    return clip if math.isfinite(clip) else 1.0


def public_frequencies(context: RunContext) -> Tensor:
    """Frequencies of the Fourier features, from the run's public seed: (D / 2, d_x)."""
    training, seed = context.config.training, context.config.federation.seed
    return fourier_frequencies(context.problem.dim, training.mmd_features, training.bandwidths, seed)
