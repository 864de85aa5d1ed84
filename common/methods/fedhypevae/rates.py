"""Public facts of a FedHypeVAE run that both sides compute alike: shapes, normalisation, rates, scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.generator.hypernetwork import GeneratorShape
from common.methods.base import RunContext, Tensors
from common.methods.constants import known_total
from common.privacy.mechanism import planned_noise

CLASS_OFFSETS = "constant.class_offsets"
PRESENCE = "presence"
"""Among what the server remembers: weights of the sites' sums, class by class."""
_SMALLEST_SHARE = 0.01


def generator_shape(context: RunContext) -> GeneratorShape:
    """Public sizes of the run's generator."""
    config, problem = context.config, context.problem
    return GeneratorShape.of(problem.dim, problem.num_classes, config.model, config.training, findings=problem.findings)


def trained_names(context: RunContext, params: Tensors) -> list[str]:
    """Names of Φ that records train; what gets no gradient gets no noise either."""
    training = context.config.training
    names = [name for name in params if not name.startswith("constant.")]
    if training.elbo_weight > 0 or training.mmd == "per-example":
        return names if training.discriminative_weight > 0 else [n for n in names if not n.startswith("class_")]
    output = generator_shape(context).output_layer
    kept = (f"{output}.class_weight", f"{output}.row_scale", "class_bias.", "class_shift.", "trunk.")
    return [name for name in names if name.startswith(kept)]


def rate_of(context: RunContext, name: str, params: Tensors) -> float:
    """Learning rate of a parameter: class columns and scores have their own; both bounded by `score_noise`."""
    training = context.config.training
    scores = name.endswith(".class_weight") or name.startswith(("class_bias.", "class_shift."))
    return (training.learning_rate if scores else training.generator_rate) * _rate_factor(context, params)


def _rate_factor(context: RunContext, params: Tensors) -> float:
    """What the rates are multiplied by, at most 1, so that noise does not drown the class scores.

    Noise adds up over steps as a random walk: after T of them a score w.z, |z| <= R, has the standard deviation
    rate / (1 - momentum) * σ * sqrt(n T) / (q N) * R, for n whole shares of noise in a sum. From public and released
    numbers alone. (σ √n / q N is what a step's noise is of the largest possible signal.)
    """
    training, privacy = context.config.training, context.config.privacy
    sites, noise = context.problem.num_sites, planned_noise(context.plan.training_noise)
    if training.score_noise == 0 or noise == 0:
        return 1.0
    shares = sites / privacy.assumptions(sites).honest_shares if privacy.trust == "secagg" else float(sites)
    total = max(known_total(params, context.config.federation.public_total), 1.0)
    steps = training.num_rounds * training.local_steps
    walk = noise * math.sqrt(shares * steps) / (privacy.sampling_rate * total) * training.feature_norm
    reached = training.learning_rate / (1.0 - training.momentum) * walk
    return min(1.0, training.score_noise / reached)


def finding_offsets(context: RunContext, prevalence: Tensor) -> Tensor:
    """As `class_offsets` for findings: weighted logs of their odds, of a prevalence (K,) from 1 % to 99 %."""
    bounded = prevalence.clamp(_SMALLEST_SHARE, 1.0 - _SMALLEST_SHARE)
    return context.config.training.logit_adjustment * torch.logit(bounded)


def class_offsets(context: RunContext, class_shares: Tensor) -> Tensor:
    """What the discriminative term adds to the class scores: weighted logs of the released class shares, (K,).

    Shares sum to 1, (K,). One counts as 1 % at least: of a smaller one the noised count says little.
    """
    shares = class_shares.clamp(min=_SMALLEST_SHARE)
    return context.config.training.logit_adjustment * torch.log(shares / shares.sum())


def weighs_presence(context: RunContext) -> bool:
    """Whether a site's sums count by what classes it has: where the server sees each site's, and only then.

    A site without a finding has records that lack it, from which its score is learned as well.
    """
    return context.config.privacy.trust == "local" and not context.problem.findings


def step_scale(context: RunContext, params: Tensors) -> float:
    """C q N / m: what a site's sum is divided by, from public and released numbers alone."""
    privacy, federation = context.config.privacy, context.config.federation
    total = known_total(params, federation.public_total)
    return clip_unit(context) * privacy.sampling_rate * max(total, 1.0) / context.problem.num_sites


def clip_unit(context: RunContext) -> float:
    """C, or 1 where nothing is clipped: rates act on gradients in units of it."""
    clip = context.config.privacy.clip_norm
    return clip if math.isfinite(clip) else 1.0
