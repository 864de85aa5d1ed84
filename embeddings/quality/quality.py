"""What a site should know of its embedding set before a run. The report stays at the site: it describes raw data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.plain import plain
from embeddings.quality.finding_facts import FindingFacts, finding_facts
from embeddings.quality.probe import FindingProbe, Probe, linear_probe
from embeddings.store.file import iterate_store, read_metadata, read_store
from embeddings.store.sets import EmbeddingSet, SetMetadata, concatenate, usable_labels

NEAR = 0.999
_BLOCK = 1024
_SKETCH = 64
_SHOWN, _PAIRS = 20, 5


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of rows: how many, and the first 20."""

    count: int = 0
    shown: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, pairs: NDArray[np.int64]) -> Pairs:
        """All of an array (n, 2)."""
        return cls(len(pairs), tuple((int(i), int(j)) for i, j in pairs[:_SHOWN]))


@dataclasses.dataclass(frozen=True)
class Quality:
    """A site's report.

    Row numbers count from 0. Of `exact` and `near` duplicates, `conflicts` are those with different labels, `leaks`
    those across splits, and `strangers` those of different patients. `refused` is why `read_store`, and with it every
    command that uses the set, would not take it. `files` are the images of the rows, where they are known.
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
    exact: Pairs
    near: Pairs
    conflicts: Pairs
    leaks: Pairs
    strangers: Pairs
    norm_quantiles: tuple[float, ...]
    probe: Probe | FindingProbe | None
    findings: FindingFacts | None = None
    refused: str = ""
    files: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def problems(self) -> tuple[str, ...]:
        """What must be put right before a run, one line each."""
        found = [
            (len(self.non_finite), "rows hold values that are not finite", self.non_finite),
            (len(self.outside_classes), "labels are none of the task's", self.outside_classes),
            (len(self.constant), "rows have the same value everywhere", self.constant),
        ]
        lines = [f"{count} {what}: row {self._some(rows)}" for count, what, rows in found if count]
        alike = [
            (self.conflicts, "have different labels"),
            (self.leaks, "lie in different splits"),
            (
                self.strangers,
                "belong to different patients: who is in a record twice has less protection than promised",
            ),
        ]
        lines += [
            f"{pairs.count} pairs of equal or nearly equal rows {what}: rows {self.shown(pairs)}"
            for pairs, what in alike
            if pairs.count
        ]
        if self.refused and not any(count for count, _, _ in found):  # else it is one of these rows
            lines.append(self.refused)
        return tuple(lines)

    def shown(self, pairs: Pairs) -> str:
        """The first pairs, with their images' names where they are known."""
        listed = ", ".join(f"{self._row(i)} = {self._row(j)}" for i, j in pairs.shown[:_PAIRS])
        return listed + (", ..." if pairs.count > _PAIRS else "")

    def _some(self, rows: tuple[int, ...]) -> str:
        return ", ".join(map(self._row, rows[:10])) + (", ..." if len(rows) > 10 else "")

    def _row(self, row: int) -> str:
        return f"{row} ({plain(self.files[row])})" if row in self.files else str(row)


def load_unchecked(path: Path) -> EmbeddingSet:
    """Read a store without refusing bad rows, so that a report can name them; raises `DataError` if it can't."""
    chunks = list(iterate_store(path))
    if chunks:
        return concatenate(chunks)
    metadata = read_metadata(path)
    empty = np.zeros((0, metadata.identity.dimension), dtype=np.float32)
    findings = metadata.task == "multilabel"
    labels = np.zeros((0, len(metadata.class_names)), np.int8) if findings else np.zeros(0, np.int64)
    return EmbeddingSet(empty, labels, metadata)


def refusal(path: Path) -> str:
    """Why a store can't be used, by the very function that reads it for use; empty where it can."""
    try:
        read_store(path)
    except DataError as error:
        return str(error)
    return ""


def inspect(data: EmbeddingSet, rng: np.random.Generator, files: Mapping[int, str] | None = None) -> Quality:
    """Examine a set.

    Args:
        data: the set; bad rows are allowed.
        rng: for the projection, the split (where the set has none) and the probe's sample.
        files: names of the rows' images, where they are known.
    """
    finite = np.isfinite(data.embeddings).all(axis=1)
    inside = usable_labels(data)
    constant = finite & (data.embeddings.max(axis=1, initial=-np.inf) == data.embeddings.min(axis=1, initial=np.inf))
    rows = np.flatnonzero(finite & ~constant)
    exact = _exact_pairs(data.embeddings, rows)
    near = _near_pairs(data.embeddings, rows, rng)
    near = near[~_contains(near, exact)] if len(near) else near
    both = np.concatenate([exact, near])
    first, second = both[:, 0], both[:, 1]

    def unlike(values: NDArray[Any] | None) -> Pairs:
        return Pairs() if values is None else Pairs.of(both[values[first] != values[second]])

    norms = np.linalg.norm(data.embeddings[finite].astype(np.float64), axis=1)
    quantiles = np.quantile(norms, (0.0, 0.05, 0.5, 0.95, 1.0)) if norms.size else np.full(5, np.nan)
    good = data.take(finite & inside)
    splits = {} if data.splits is None else dict(zip(*_counted(data.splits), strict=True))
    sizes = None if data.groups is None else np.unique(data.groups, return_counts=True)[1]
    return Quality(
        metadata=data.metadata,
        rows=len(data),
        class_counts=good.metadata.class_counts,
        split_counts=splits,
        patients=None if sizes is None else int(sizes.size),
        most_per_patient=None if sizes is None else int(sizes.max(initial=0)),
        non_finite=tuple(np.flatnonzero(~finite).tolist()),
        constant=tuple(np.flatnonzero(constant).tolist()),
        outside_classes=tuple(np.flatnonzero(~inside).tolist()),
        exact=Pairs.of(exact),
        near=Pairs.of(near),
        conflicts=Pairs.of(both[_differ(data.labels[first], data.labels[second])]),
        leaks=unlike(data.splits),
        strangers=unlike(data.groups),
        norm_quantiles=tuple(quantiles.tolist()),
        probe=linear_probe(good, rng),
        findings=finding_facts(good) if data.metadata.task == "multilabel" else None,
        files=files or {},
    )


def _differ(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.bool_]:
    """Which labels contradict each other: a finding that one of two rows does not know contradicts nothing."""
    if first.ndim == 1:
        return np.asarray(first != second)
    return np.asarray(((first != second) & (first >= 0) & (second >= 0)).any(axis=1))


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
