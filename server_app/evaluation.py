"""Scores of a run, where every site declares its data public: heads go to the sites, scores come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from common.evaluation.heads import LinearHead, fit_linear_head
from common.evaluation.scores import HEAD_SCALE, MIXING
from common.methods.base import Artifact, RunContext, seeded
from common.privacy.combined import ReleasedStatistics
from common.records import cumulative
from common.wire.allow_list import SCORE_NAMES
from server_app.strategy import FederatedStrategy

_PARTS = ("accuracy", "balanced_accuracy")


def evaluate(
    grid: Grid,
    strategy: FederatedStrategy,
    context: RunContext,
    artifact: Artifact,
    synthetic: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Score the published set at every site.

    `statistics_only` is a head on Gaussians at the class means of the run's own statistics: what their share of the
    budget gives without any training.

    Returns:
        For each of SCORE_NAMES that applies: accuracy and balanced_accuracy, means over sites, and `per_site`.
    """
    heads = {}
    published = published_head(context, artifact, synthetic)
    if published is not None:
        heads["synthetic"] = published.scaled(HEAD_SCALE)
    means = _means_head(context, strategy.state.statistics)
    if means is not None:
        heads["statistics"] = means
    tensors = {f"{name}.{part}": getattr(head, part) for name, head in heads.items() for part in ("weight", "bias")}
    outcome = strategy.ask_scores(grid, tensors, {"mixing": MIXING})
    per_site = {strategy.members[node].name: reply.scores for node, reply in outcome.replies.items()}
    return _means(per_site)


def published_head(
    context: RunContext, artifact: Artifact, synthetic: tuple[Tensor, Tensor] | None
) -> LinearHead | None:
    """The linear classifier that anybody gets from what is published; None where sites have models of their own."""
    problem = context.problem
    if "head.weight" in artifact.tensors:
        return LinearHead(artifact.tensors["head.weight"], artifact.tensors["head.bias"], findings=problem.findings)
    if synthetic is None:
        return None
    rows, labels = synthetic
    if problem.task == "ordinal":
        labels = cumulative(labels, len(problem.class_names))
    return fit_linear_head(rows, labels, num_classes=problem.num_classes)


def _means_head(context: RunContext, statistics: ReleasedStatistics | None) -> LinearHead | None:
    """A head on Gaussians at the released class means; None where the run released none that all sites share."""
    # of sites with encoders of their own there are no common class means; records with a finding have others too
    if statistics is None or statistics.class_means is None or context.problem.site_dims or context.problem.findings:
        return None
    classes, rows = context.problem.num_classes, context.config.synthesis.synthetic_rows
    labels = torch.arange(rows) % classes
    spread = (context.config.model.residual_energy / context.problem.dim) ** 0.5
    noise = torch.randn(rows, context.problem.dim, generator=seeded("class means", context.config.federation.seed))
    return fit_linear_head(statistics.class_means[labels] + spread * noise, labels, num_classes=classes)


def _means(per_site: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for name in SCORE_NAMES:
        sites = {
            site: {part: values[f"{name}.{part}"] for part in _PARTS}
            for site, values in sorted(per_site.items())
            if f"{name}.accuracy" in values
        }
        if sites:
            means = {part: sum(site[part] for site in sites.values()) / len(sites) for part in _PARTS}
            scores[name] = {**means, "per_site": sites}
    return scores
