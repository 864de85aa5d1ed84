"""Can a linear model learn a site's labels from its embeddings? A quick look before any run."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from common.evaluation.splits import split_site
from embeddings.store.sets import EmbeddingSet

_PROBE_ROWS = 5_000


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier trained on the site's training rows and scored on its test rows."""

    accuracy: float
    balanced_accuracy: float
    chance: float
    train_rows: int
    test_rows: int


@dataclasses.dataclass(frozen=True)
class FindingProbe:
    """The same for findings: AUROC, averaged over those with two records or more that have it and that have it not."""

    auroc: float
    findings: int
    train_rows: int
    test_rows: int


def linear_probe(data: EmbeddingSet, rng: np.random.Generator) -> Probe | FindingProbe | None:
    """Train a linear classifier on training rows and score it on test rows.

    Args:
        data: a set without bad rows; without splits it is divided (by patient, where it has patients).
        rng: of the division and of the sample of at most 5,000 training rows.

    Returns:
        The scores, or None when fewer than two classes can be trained, nothing is left to test, or numbers are too
        large for the arithmetic.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    if len(data) == 0:
        return None
    splits = split_site(data.labels, rng, data.groups) if data.splits is None else data.splits
    train = rng.permutation(np.flatnonzero(splits == "train"))[:_PROBE_ROWS]
    test = np.flatnonzero(splits == "test")
    if data.metadata.task != "multilabel":
        test = test[np.isin(data.labels[test], data.labels[train])]
    classes = np.unique(data.labels[train])
    if classes.size < 2 or test.size == 0:
        return None
    mean, deviation = data.embeddings[train].mean(axis=0), data.embeddings[train].std(axis=0) + 1e-6
    if not np.isfinite(mean + deviation).all():
        return None
    inputs, questions = (data.embeddings[train] - mean) / deviation, (data.embeddings[test] - mean) / deviation
    if data.metadata.task == "multilabel":
        return _finding_probe(inputs, data.labels[train], questions, data.labels[test])
    head = LogisticRegression(C=0.01, max_iter=300)
    head.fit(inputs, data.labels[train])
    predicted = head.predict(questions)
    return Probe(
        accuracy=float((predicted == data.labels[test]).mean()),
        balanced_accuracy=float(balanced_accuracy_score(data.labels[test], predicted)),
        chance=1.0 / classes.size,
        train_rows=int(train.size),
        test_rows=int(test.size),
    )


def _finding_probe(
    inputs: NDArray[np.float32], labels: NDArray[np.int8], questions: NDArray[np.float32], truth: NDArray[np.int8]
) -> FindingProbe | None:
    """One ridge regression for all findings, an unknown one taken as its mean: a look, in the time of one solve."""
    from sklearn.linear_model import Ridge
    from sklearn.metrics import roc_auc_score

    known = labels >= 0
    means = np.where(known, labels, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    head = Ridge(alpha=float(inputs.shape[1])).fit(inputs, np.where(known, labels, means))
    scores = head.predict(questions).reshape(len(questions), -1)
    found = []
    for finding, wanted in enumerate(truth.T):
        rows = wanted >= 0
        if min((wanted == 1).sum(), (wanted == 0).sum()) >= 2:
            found.append(roc_auc_score(wanted[rows], scores[rows, finding]))
    return FindingProbe(float(np.mean(found)), len(found), len(inputs), len(questions)) if found else None
