"""What methods that train a linear head on centred embeddings share: features, plans, and the published head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.config.rivals import RivalsConfig
from common.evaluation.heads import LinearHead
from common.findings import residuals
from common.methods.base import Artifact, RunContext, ServerState
from common.methods.constants import CENTRE
from common.methods.labels import for_task
from common.privacy.combined import ReleasedStatistics
from common.privacy.statistics import TRAINING_COUNT_WEIGHT, StatisticsSpec


def centre_statistics(context: RunContext) -> StatisticsSpec | None:
    """The class counts and the total sum: what centring needs; None where the sites' widths differ."""
    if context.plan.statistics_noise is None or context.problem.site_dims:
        return None
    problem, weight = context.problem, TRAINING_COUNT_WEIGHT
    spec = StatisticsSpec(problem.dim, problem.num_classes, count_weight=weight, class_weight=0.0)
    return for_task(context, spec)


def with_centre(context: RunContext, state: ServerState, statistics: ReleasedStatistics) -> ServerState:
    """Take the released mean into what the sites receive."""
    return replace(state, params={**state.params, CENTRE: statistics.centre}, statistics=statistics)


def head_artifact(context: RunContext, weight: Tensor, bias: Tensor, centre: Tensor, scale: float) -> Artifact:
    """The head that acts on embeddings as they are, from one that acts on (embedding - centre) x scale.

    Args:
        context: the run.
        weight: (K, d_x). bias: (K,).
        centre: (d_x,). scale: > 0.

    Returns:
        Kind "head" with "head.weight" (K, d_x) and "head.bias" (K,).
    """
    weight = weight * scale
    tensors = {"head.weight": weight, "head.bias": bias - weight @ centre}
    return Artifact("head", tensors, {"dim": weight.shape[1], "num_classes": weight.shape[0]})


def published_head(artifact: Artifact) -> LinearHead | None:
    """The linear head that an artifact publishes; None where it publishes none."""
    if "head.weight" not in artifact.tensors:
        return None
    return LinearHead(artifact.tensors["head.weight"], artifact.tensors["head.bias"])


def descend_head(
    weight: Tensor,
    bias: Tensor,
    features: Tensor,
    labels: Tensor,
    settings: RivalsConfig,
    generator: torch.Generator,
    prox_mu: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Local SGD on the mean cross-entropy of a linear head, with momentum, weight decay and a proximal pull.

    Args:
        weight: (K, d). bias: (K,). Where it starts, and what the proximal term pulls to.
        features: (n, d). labels: classes (n,) or findings (n, K). n may be 0: nothing is done then.
        settings: epochs, batch size, rate, momentum and weight decay (of the weights, not of the biases).
        generator: orders the records; public.
        prox_mu: μ of μ/2 |w - w_global|^2; 0 leaves it out.

    Returns:
        The new weight and bias.

    Source: McMahan et al. (2017), Algorithm 1; Li et al. (2020), Eq. 2 for μ > 0.
    """
    # one matrix with the bias as its last column, so that a step is two products
    start = torch.cat([weight, bias[:, None]], 1)
    inputs = torch.cat([features, features.new_ones(features.shape[0], 1)], 1)
    decay = torch.full((start.shape[1],), settings.local_decay)
    decay[-1] = 0.0
    current, velocity = start.clone(), torch.zeros_like(start)
    for _ in range(settings.local_epochs):
        order = torch.randperm(labels.shape[0], generator=generator)
        for rows in torch.split(order, settings.local_batch_size):
            if rows.numel() == 0:
                continue
            batch = inputs[rows]
            gradient = residuals(batch @ current.T, labels[rows]).T @ batch / rows.numel() + decay * current
            if prox_mu > 0:
                gradient = gradient + prox_mu * (current - start)
            velocity = settings.local_momentum * velocity + gradient
            current = current - settings.local_rate * velocity
    return current[:, :-1].contiguous(), current[:, -1].contiguous()
