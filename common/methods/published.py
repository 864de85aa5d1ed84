"""The set that a run publishes: which classes its rows should have, and which of a generator's codes they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from common.errors import ConfigError
from common.evaluation.scores import Split
from common.generator.label_tree import LabelTree
from common.generator.row_numbers import row_key
from common.generator.row_sets import RowSet
from common.methods import get_method
from common.methods.base import Artifact, RunContext

Code = int | str | None
_GOLDEN = (math.sqrt(5) - 1) / 2
MOST_ROWS = 1_000_000_000


def wanted_counts(rows: int, weights: Sequence[float]) -> list[int]:
    """How many rows of each class make `rows` in all: shares by weight, the rest to the largest remainders.

    Args:
        rows: at least 1.
        weights: (K,), each at least 0 and finite, not all 0.

    Raises:
        ConfigError: rows or weights out of range.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise ConfigError(f"rows must be between 1 and {MOST_ROWS}, found {rows}: draw in several parts")
    if not weights or any(not (0 <= weight < math.inf) for weight in weights) or sum(weights) <= 0:
        raise ConfigError(f"expected class weights of at least 0 that are not all 0, found {list(weights)}")
    exact = [rows * weight / sum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: rows - sum(counts)]:
        counts[index] += 1
    return counts


def interleaved_labels(counts: Sequence[int], numbers: Tensor) -> Tensor:
    """Labels of some rows of a set with so many rows of each class, evenly mixed: numbers (n,) int64 -> (n,).

    Every stretch of rows has the classes nearly in proportion, and nothing is kept in memory: row i takes place
    (i x stride) mod N of the sorted labels, with a stride near N times the golden ratio and without a common divisor.
    """
    total = sum(counts)
    stride = max(round(total * _GOLDEN), 1)
    while math.gcd(stride, total) > 1:
        stride += 1
    places = numbers * stride % total
    edges = torch.cumsum(torch.tensor(list(counts)), 0)
    return torch.searchsorted(edges, places, right=True)


def class_weights(artifact: Artifact) -> list[float]:
    """The noised class counts that a run published, as weights of the classes.

    Raises:
        ConfigError: it published none.
    """
    if "class_counts" not in artifact.tensors:
        raise ConfigError("this run published no noised class counts: take the balance uniform or given")
    return [float(count) for count in artifact.tensors["class_counts"]]


def with_code(artifact: Artifact, code: Code) -> Artifact:
    """The same generator, sampled at one of its codes.

    Args:
        artifact: what a run published.
        code: None, as published; "meta", the one code that was fitted to the released statistics; "mixture", all codes
            by their weights; a number (or its text), that code of the mixture.

    Raises:
        ConfigError: the generator has no such code.
    """
    if code is None:
        return artifact
    if "meta.codes" not in artifact.tensors:
        raise ConfigError(f"this generator has no codes: leave the code out, found {code!r}")
    codes, weights = artifact.tensors["meta.codes"], artifact.tensors["meta.weights"]
    count = codes.shape[0]
    if code == "mixture":
        return artifact
    if code == "meta":
        if count > 1:
            raise ConfigError(f"this run fitted a mixture of {count} codes: ask for mixture, or for 0 to {count - 1}")
        return artifact
    text = str(code)
    if not text.isascii() or not text.isdigit() or int(text) >= count:
        raise ConfigError(f"code must be meta, mixture or a number from 0 to {count - 1}, found {code!r}")
    index = int(text)
    chosen = {"meta.codes": codes[index : index + 1], "meta.weights": torch.ones_like(weights[:1])}
    return replace(artifact, tensors={**artifact.tensors, **chosen})


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
    tree = LabelTree.of(artifact.tensors)
    if tree is not None:
        seed = context.config.federation.seed
        key, rows = row_key("published", seed), synthesis.synthetic_rows
        return RowSet(law(context, artifact), key, rows, partial(tree.draw, "published", seed), 1)
    by_counts = synthesis.balance == "dp-counts" and "class_counts" in artifact.tensors
    weights = class_weights(artifact) if by_counts else [1.0] * context.problem.num_classes
    counts = wanted_counts(synthesis.synthetic_rows, weights)
    return RowSet(
        law(context, artifact),
        row_key("published", context.config.federation.seed),
        synthesis.synthetic_rows,
        lambda numbers: interleaved_labels(counts, numbers),
        1,
    )
