"""What a site should know of its embedding set before a run. The report stays at the site: it describes raw data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.evaluation.splits import split_site
from embeddings.store.file import iterate_store, read_metadata, read_store
from embeddings.store.sets import EmbeddingSet, SetMetadata, concatenate

NEAR = 0.999
_BLOCK = 1024
_SKETCH = 64
_SHOWN = 20
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
class Quality:
    """A site's report.

    Row numbers count from 0. `exact_duplicates` and `near_duplicates` are pairs of rows (the first 20); their
    numbers are `*_count`. `conflicts` counts duplicate pairs with different labels, `leaks` those across
    splits. `refused` is why `read_store`, and with it every command that uses the set, would not take it.
    """

    metadata: SetMetadata
    rows: int
    class_counts: tuple[int, ...]
    split_counts: dict[str, int]
    patients: int | None
    most_per_patient: int | None
    non_finite: tuple[int, ...]
    constant: tuple[int, ...]
    outside_classes: tuple[int, ...]
    exact_count: int
    exact_duplicates: tuple[tuple[int, int], ...]
    near_count: int
    near_duplicates: tuple[tuple[int, int], ...]
    conflicts: int
    leaks: int
    norm_quantiles: tuple[float, ...]
    probe: Probe | None
    refused: str = ""

    @property
    def problems(self) -> tuple[str, ...]:
        """What must be put right before a run, one line each."""
        found = [
            (len(self.non_finite), "rows hold values that are not finite", self.non_finite),
            (len(self.outside_classes), "labels lie outside the classes", self.outside_classes),
            (len(self.constant), "rows have the same value everywhere", self.constant),
        ]
        lines = [f"{count} {what}: row {_some(rows)}" for count, what, rows in found if count]
        if self.conflicts:
            lines.append(f"{self.conflicts} pairs of equal or nearly equal rows have different labels")
        if self.leaks:
            lines.append(f"{self.leaks} pairs of equal or nearly equal rows lie in different splits")
        if self.refused and not any(count for count, _, _ in found):  # else it is one of these rows
            lines.append(self.refused)
        return tuple(lines)


def load_unchecked(path: Path) -> EmbeddingSet:
    """Read a store without refusing bad rows, so that a report can name them; raises `DataError` if it can't."""
    chunks = list(iterate_store(path))
    if chunks:
        return concatenate(chunks)
    metadata = read_metadata(path)
    empty = np.zeros((0, metadata.identity.dimension), dtype=np.float32)
    return EmbeddingSet(empty, np.zeros(0, dtype=np.int64), metadata)


def refusal(path: Path) -> str:
    """Why a store can't be used, by the very function that reads it for use; empty where it can."""
    try:
        read_store(path)
    except DataError as error:
        return str(error)
    return ""


def inspect(data: EmbeddingSet, rng: np.random.Generator) -> Quality:
    """Examine a set.

    Args:
        data: the set; bad rows are allowed.
        rng: for the projection, the split (where the set has none) and the probe's sample.

    Returns:
        The report.

    """
    finite = np.isfinite(data.embeddings).all(axis=1)
    inside = (data.labels >= 0) & (data.labels < data.num_classes)
    constant = finite & (data.embeddings.max(axis=1, initial=-np.inf) == data.embeddings.min(axis=1, initial=np.inf))
    rows = np.flatnonzero(finite & ~constant)
    exact = _exact_pairs(data.embeddings, rows)
    near = _near_pairs(data.embeddings, rows, rng)
    near = near[~_contains(near, exact)] if len(near) else near
    both = np.concatenate([exact, near])
    first, second = both[:, 0], both[:, 1]
    norms = np.linalg.norm(data.embeddings[finite].astype(np.float64), axis=1)
    quantiles = np.quantile(norms, (0.0, 0.05, 0.5, 0.95, 1.0)) if norms.size else np.full(5, np.nan)
    good = data.take(finite & inside)
    splits = {} if data.splits is None else dict(zip(*_counted(data.splits), strict=True))
    sizes = None if data.groups is None else np.unique(data.groups, return_counts=True)[1]
    return Quality(
        metadata=data.metadata,
        rows=len(data),
        class_counts=tuple(int(count) for count in np.bincount(good.labels, minlength=data.num_classes)),
        split_counts=splits,
        patients=None if sizes is None else int(sizes.size),
        most_per_patient=None if sizes is None else int(sizes.max(initial=0)),
        non_finite=tuple(np.flatnonzero(~finite).tolist()),
        constant=tuple(np.flatnonzero(constant).tolist()),
        outside_classes=tuple(np.flatnonzero(~inside).tolist()),
        exact_count=len(exact),
        exact_duplicates=_pairs(exact),
        near_count=len(near),
        near_duplicates=_pairs(near),
        conflicts=int((data.labels[first] != data.labels[second]).sum()),
        leaks=0 if data.splits is None else int((data.splits[first] != data.splits[second]).sum()),
        norm_quantiles=tuple(quantiles.tolist()),
        probe=linear_probe(good, rng),
    )


def linear_probe(data: EmbeddingSet, rng: np.random.Generator) -> Probe | None:
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
    test = np.flatnonzero((splits == "test") & np.isin(data.labels, data.labels[train]))
    classes = np.unique(data.labels[train])
    if classes.size < 2 or test.size == 0:
        return None
    mean, deviation = data.embeddings[train].mean(axis=0), data.embeddings[train].std(axis=0) + 1e-6
    if not np.isfinite(mean + deviation).all():
        return None
    head = LogisticRegression(C=0.01, max_iter=300)
    head.fit((data.embeddings[train] - mean) / deviation, data.labels[train])
    predicted = head.predict((data.embeddings[test] - mean) / deviation)
    return Probe(
        accuracy=float((predicted == data.labels[test]).mean()),
        balanced_accuracy=float(balanced_accuracy_score(data.labels[test], predicted)),
        chance=1.0 / classes.size,
        train_rows=int(train.size),
        test_rows=int(test.size),
    )


def _exact_pairs(embeddings: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pair each repeated row with the first one like it."""
    first: dict[bytes, int] = {}
    pairs = []
    for row in rows.tolist():
        earlier = first.setdefault(embeddings[row].tobytes(), row)
        if earlier != row:
            pairs.append((earlier, row))
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def _near_pairs(
    embeddings: NDArray[np.float32], rows: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Find pairs whose centred cosine exceeds `NEAR`: candidates by a random projection, then exactly."""
    if rows.size < 3:
        return np.zeros((0, 2), dtype=np.int64)
    values = embeddings[rows] - embeddings[rows].mean(axis=0)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    width = values.shape[1]
    if width > _SKETCH:
        sketch = values @ (rng.standard_normal((width, _SKETCH)) / np.sqrt(_SKETCH)).astype(np.float32)
    else:
        sketch = values
    squares = (sketch**2).sum(axis=1)
    # A pair at the limit has a squared distance of 2(1 - NEAR); the projection keeps it within a factor of 2
    # but
    # with a probability below 1e-5 (chi-squared with 64 degrees of freedom).
    limit = 2.0 * (1.0 - NEAR) * (2.0 if width > _SKETCH else 1.0)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(sketch), _BLOCK):
        block = sketch[start : start + _BLOCK]
        distances = squares[start : start + _BLOCK, None] + squares[None, start:] - 2.0 * block @ sketch[start:].T
        left, right = np.nonzero(distances <= limit + 1e-6)
        later = right > left
        left, right = left[later] + start, right[later] + start
        for cut in range(0, left.size, 65_536):
            i, j = left[cut : cut + 65_536], right[cut : cut + 65_536]
            close = np.einsum("nd,nd->n", values[i], values[j]) >= NEAR
            found.append(np.stack([rows[i[close]], rows[j[close]]], axis=1))
    return np.concatenate(found)


def _contains(pairs: NDArray[np.int64], exact: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which near pairs are exact: both rows have the same first row."""
    first = {int(row): int(earlier) for earlier, row in exact}
    same = [first.get(int(i), int(i)) == first.get(int(j), int(j)) for i, j in pairs]
    return np.asarray(same, dtype=np.bool_)


def _counted(values: NDArray[np.str_]) -> tuple[list[str], list[int]]:
    names, counts = np.unique(values, return_counts=True)
    return [str(name) for name in names], [int(count) for count in counts]


def _pairs(pairs: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    return tuple((int(i), int(j)) for i, j in pairs[:_SHOWN])


def _some(rows: tuple[int, ...]) -> str:
    return ", ".join(str(row) for row in rows[:10]) + (", ..." if len(rows) > 10 else "")
