"""What a published bundle is worth on one's own records: four ways to train, three kinds of head, clinicians' numbers.

Everything here reads records without noise: heads and scores stay where the records are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ConfigError, DataError
from common.evaluation.clinical import ClinicalScores, as_findings, clinical_scores
from common.evaluation.heads import fit_linear_head
from common.evaluation.nonlinear_heads import fit_mlp_head, fit_neighbour_head
from common.evaluation.scores import SiteScores, Split, choose_mixing, mix_probabilities, score_decisions
from common.evaluation.splits import SPLIT_NAMES, split_by_unit
from common.names import Task
from common.publishing.bundle import Bundle
from common.records import on_sphere

HeadKind = Literal["linear", "mlp", "knn"]
HEADS: dict[HeadKind, str] = {"linear": "linear", "mlp": "small network", "knn": "nearest neighbours"}
WAYS = {
    "local_only": "own data only",
    "synthetic_only": "synthetic set only",
    "pooled": "both in one training",
    "mixed": "two classifiers, mixed",
}
"""Ways to train, as fields of `HeadScores`, in words."""


class Head(Protocol):
    """Whatever gives probabilities (n, K) for embeddings (n, d)."""

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, K): of classes, rows summing to one, or of each finding."""
        ...


@dataclass(frozen=True)
class HeadScores:
    """Scores of one kind of head on the same test rows, by what it was trained on.

    Attributes:
        local_only: one's own training rows.
        synthetic_only: the published set.
        pooled: both together.
        mixed: probabilities of the first two, mixed.
        mixing: the weight of one's own head in `mixed`.
    """

    local_only: ClinicalScores
    synthetic_only: ClinicalScores
    pooled: ClinicalScores
    mixed: ClinicalScores
    mixing: float


@dataclass(frozen=True)
class Evaluation:
    """Scores by kind of head, those of always giving the commonest answer, and how many rows they rest on."""

    scores: dict[HeadKind, HeadScores]
    commonest: SiteScores
    train_rows: int
    validation_rows: int
    test_rows: int
    synthetic_rows: int


def evaluate(
    bundle: Bundle,
    embeddings: Tensor,
    labels: Tensor,
    *,
    groups: Tensor | None = None,
    splits: Sequence[str] | NDArray[np.str_] | None = None,
    synthetic: Split | None = None,
    mixing: float | None = None,
    heads: Sequence[HeadKind] = tuple(HEADS),
    seed: int = 0,
) -> Evaluation:
    """Train heads on one's own rows, on the published set, on both, and score them on one's own test rows.

    Args:
        bundle: what was published.
        embeddings: (n, d) of the encoder that the bundle names.
        labels: (n,) int64 in the order of `bundle.class_names`; of a multi-label run findings (n, K) int8.
        groups: (n,) patient of each row: no patient is on both sides of a split, and intervals are over patients.
        splits: (n,) "train", "validation" or "test"; left out, 64/16/20 as a site divides its file for training: no row
            that the published set learned from is tested on, where the embeddings are as in the file.
        synthetic: another synthetic set, such as one drawn with `bundle.draw`; default: the published one.
        mixing: weight of one's own head in `mixed`; left out, it is chosen on the validation rows.
        heads: which kinds.
        seed: of the MLP's first weights and of the bootstrap.

    Returns:
        The scores. They depend on the records without noise: keep them, and `mixing`, where the records are.

    Raises:
        DataError: shapes that don't fit the bundle, or an empty training or test split. ConfigError: an unknown head.
    """
    unknown = sorted(set(heads) - set(HEADS))
    if unknown or not heads:
        raise ConfigError(f"heads must be some of {', '.join(HEADS)}, found {', '.join(unknown) or 'none'}")
    rows, labels = prepared(bundle, embeddings, labels)
    parts = _split(embeddings, labels, groups, splits)
    train, validation, test = ((rows[parts[name]], labels[parts[name]]) for name in SPLIT_NAMES)
    patients = None if groups is None else groups[parts["test"]]
    made = bundle.published() if synthetic is None else synthetic
    both = torch.cat([train[0], made[0]]), torch.cat([train[1], made[1]])

    names, task = bundle.class_names, bundle.context.problem.task

    def measured(probabilities: Tensor) -> ClinicalScores:
        return clinical_scores(test[1], probabilities, names, task=task, units=patients, seed=seed)

    known = validation[1] if task == "multiclass" else as_findings(validation[1], len(names), task)
    scores: dict[HeadKind, HeadScores] = {}
    for kind in heads:
        local, published, pooled = (
            fit_head(kind, *given, len(names), seed=seed, task=task) for given in (train, made, both)
        )
        weight = mixing
        if weight is None:
            chances = [head.probabilities(validation[0]) for head in (local, published)]
            weight = choose_mixing(chances[0], chances[1], known)
        ours, theirs = local.probabilities(test[0]), published.probabilities(test[0])
        scores[kind] = HeadScores(
            measured(ours),
            measured(theirs),
            measured(pooled.probabilities(test[0])),
            measured(mix_probabilities(ours, theirs, weight)),
            weight,
        )
    commonest = score_decisions(test[1], commonest_answer(train[1]).expand(test[1].shape))
    return Evaluation(scores, commonest, len(train[1]), len(validation[1]), len(test[1]), len(made[1]))


def commonest_answer(labels: Tensor) -> Tensor:
    """The class or grade that most rows have, (); of findings (n, K) whether more rows have each than lack it, (K,)."""
    if labels.ndim == 1:
        return torch.bincount(labels).argmax()
    return (labels == 1).sum(0) > (labels == 0).sum(0)


def fit_head(
    kind: HeadKind,
    embeddings: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    seed: int = 0,
    task: Task = "multiclass",
) -> Head:
    """A head of that kind.

    Args:
        kind: one of `HEADS`.
        embeddings: (n, d).
        labels: (n,) classes or grades 0..K-1, or findings (n, K).
        num_classes: K, classes, findings or grades.
        seed: of the MLP's first weights and the order of its rows.
        task: what the labels are. The K - 1 outputs of K grades say that the grade is k + 1 or higher.
    """
    if task != "multiclass":
        labels = as_findings(labels, num_classes, task)
        num_classes = labels.shape[1]
    fits: dict[HeadKind, Callable[[], Head]] = {
        "linear": lambda: fit_linear_head(embeddings, labels, num_classes),
        "mlp": lambda: fit_mlp_head(embeddings, labels, num_classes, torch.Generator().manual_seed(seed)),
        "knn": lambda: fit_neighbour_head(embeddings, labels, num_classes),
    }
    return fits[kind]()


def prepared(bundle: Bundle, embeddings: Tensor, labels: Tensor | None = None) -> Split:
    """One's own rows as the bundle's are: float32, and of unit length where the run scaled them so.

    Args:
        bundle: what was published.
        embeddings: (n, d), d as the bundle's.
        labels: (n,) int64, 0..K-1, or (n, K) int8 findings; left out, they come back empty.

    Raises:
        DataError: "expected embeddings (n, ...) ..., found ...".
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != bundle.dim:
        raise DataError(
            f"expected embeddings (n, {bundle.dim}) of the bundle's encoder, found {tuple(embeddings.shape)}: embed "
            "the images with the encoder that the bundle names"
        )
    rows = embeddings.to(torch.float32)
    rows = on_sphere(rows)
    if labels is None:
        return rows, torch.empty(0, dtype=torch.int64)
    classes = len(bundle.class_names)
    shape: tuple[int, ...] = (len(rows),)
    kind, least, most = torch.int64, 0, classes - 1
    if bundle.context.problem.task == "multilabel":
        shape, kind, least, most = (len(rows), classes), torch.int8, -1, 1
    fits = labels.shape == shape and labels.dtype == kind and len(labels) > 0
    if not fits or int(labels.min()) < least or int(labels.max()) > most:
        raise DataError(f"expected labels {shape} ({kind}) from {least} to {most}, found {tuple(labels.shape)}")
    return rows, labels


def _split(
    embeddings: Tensor, labels: Tensor, groups: Tensor | None, splits: Sequence[str] | NDArray[np.str_] | None
) -> dict[str, Tensor]:
    """Row numbers of each split."""
    if groups is not None and groups.shape != labels.shape[:1]:
        raise DataError(f"expected a group for each of {len(labels)} rows, found {tuple(groups.shape)}")
    patients = None if groups is None else groups.numpy()
    names = np.asarray(split_by_unit(embeddings.float().numpy(), patients) if splits is None else splits)
    if len(names) != len(labels):
        raise DataError(f"expected a split for each of {len(labels)} rows, found {len(names)}")
    parts = {name: torch.from_numpy(np.flatnonzero(names == name)) for name in SPLIT_NAMES}
    empty = [name for name in ("train", "test") if len(parts[name]) == 0]
    if empty:
        raise DataError(f"no rows to {empty[0]} on: {len(labels)} rows are too few, or the split leaves them out")
    return parts
