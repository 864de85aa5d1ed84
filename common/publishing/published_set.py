"""The synthetic set that a run publishes, as its settings ask for it."""

from __future__ import annotations

from common.evaluation.scores import Split
from common.generator.row_numbers import row_key
from common.methods import get_method
from common.methods.base import Artifact, RunContext
from common.publishing.drawing import class_weights, interleaved_labels, wanted_counts
from common.publishing.row_sets import MOST_TRIES, RowSet


def draw_published(context: RunContext, artifact: Artifact) -> Split | None:
    """The run's published set in memory; None for a method without samples."""
    due = published_set(context, artifact)
    return None if due is None else due.all()


def published_set(context: RunContext, artifact: Artifact) -> RowSet | None:
    """The set that a run publishes, as its settings ask for it; None for a method that rows can't be drawn from.

    A function of what is published alone: generator, settings and seed. Post-processing.
    """
    law, synthesis = get_method(context.config.method).law, context.config.synthesis
    if law is None:
        return None
    by_counts = synthesis.balance == "dp-counts" and "class_counts" in artifact.tensors
    weights = class_weights(artifact) if by_counts else [1.0] * context.problem.num_classes
    counts = wanted_counts(synthesis.synthetic_rows, weights)
    return RowSet(
        law(context, artifact),
        row_key("published", context.config.federation.seed),
        synthesis.synthetic_rows,
        lambda numbers: interleaved_labels(counts, numbers),
        MOST_TRIES if synthesis.keep_balance else 1,
    )
