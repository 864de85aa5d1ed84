"""The embedding set of a site in memory: rows, metadata, their checks, the fingerprint of the content."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.evaluation.splits import SPLIT_NAMES
from common.names import Task
from common.wire.identity import EncoderIdentity

RESERVED = ("embedding", "label", "patient", "split", "key")  # columns with a meaning of their own
FORMAT = "fedhypevae-embeddings/1"
_ROWS_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class SetMetadata:
    """What a set knows of itself.

    `class_counts` are the records of each class or grade, of a multi-label set the records that have each finding.
    `fingerprint` is over the content and filled in on writing; `canary` is the embedding of the project's
    canary image (`agreement.encode`), by which a wrong backend or wrong weights are found. `task` says what the
    labels are: one class a record, K findings a record, or one grade a record (the classes are its grades in order).
    """

    identity: EncoderIdentity
    class_counts: tuple[int, ...] = ()
    created: str = ""
    fingerprint: str = ""
    canary: str = ""
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    task: Task = "multiclass"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, findings or grades, in the order of the labels."""
        return self.identity.class_names


@dataclasses.dataclass(frozen=True)
class EmbeddingSet:
    """Labelled embeddings of one site (or a simulation's pool).

    `embeddings` (n, d) float32; `labels` (n,) int64 in 0..K-1, of a multi-label set (n, K) int8 with 1 where a
    finding is present, 0 where it is absent and -1 where nobody knows; `groups` (n,) int64, one number per patient,
    or None; `splits` (n,) of `SPLIT_NAMES`, or None; `columns` further text columns; `keys` (n, 16) uint8, or
    None.
    """

    embeddings: NDArray[np.float32]
    labels: NDArray[Any]
    metadata: SetMetadata
    groups: NDArray[np.int64] | None = None
    splits: NDArray[np.str_] | None = None
    columns: Mapping[str, NDArray[np.str_]] = dataclasses.field(default_factory=dict)
    keys: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    @property
    def dimension(self) -> int:
        """Width of the embeddings."""
        return int(self.embeddings.shape[1])

    @property
    def num_classes(self) -> int:
        """Number of classes, findings or grades, those without a record included."""
        return len(self.metadata.class_names)

    def take(self, rows: NDArray[Any]) -> EmbeddingSet:
        """Return the set of the given rows (indices or a mask), with the class counts of those rows."""
        taken = self.rows(rows)
        counts = tuple(int(count) for count in counts_of(taken.labels, self.num_classes))
        metadata = dataclasses.replace(self.metadata, class_counts=counts, fingerprint="")
        return dataclasses.replace(taken, metadata=metadata)

    def rows(self, rows: NDArray[Any] | slice) -> EmbeddingSet:
        """As `take`, with the metadata as it is."""
        return dataclasses.replace(
            self,
            embeddings=self.embeddings[rows],
            labels=self.labels[rows],
            groups=None if self.groups is None else self.groups[rows],
            splits=None if self.splits is None else self.splits[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
            keys=None if self.keys is None else self.keys[rows],
        )

    def split(self, name: str) -> EmbeddingSet:
        """Return the rows of one split.

        Args:
            name: one of `SPLIT_NAMES`.

        Returns:
            The set of those rows; may be empty.

        Raises:
            DataError: the set has no splits, or there is no such split.
        """
        if self.splits is None:
            raise DataError("the set has no `split` column; divide it first (fedhypevae data partition)")
        if name not in SPLIT_NAMES:
            raise DataError(f"expected a split of {', '.join(SPLIT_NAMES)}; found {name!r}")
        return self.take(self.splits == name)


def counts_of(labels: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """Records of each class or grade, or that have each finding: (n,) or (n, K) labels -> (K,)."""
    if labels.ndim == 2:
        return (labels == 1).sum(axis=0)
    return np.bincount(labels, minlength=num_classes)


def survey(
    chunks: Iterable[EmbeddingSet], metadata: SetMetadata, precision: str
) -> tuple[str, tuple[int, ...], int, tuple[str, ...]]:
    """Validate chunks and take their fingerprint, which is the same however the rows are cut.

    Args:
        chunks: sets with the same columns.
        metadata: names the encoder, the classes and the task.
        precision: as stored, `float16` or `float32`.

    Returns:
        Fingerprint, class counts, number of rows, names of the columns.

    Raises:
        DataError: as `validate`, or there are no rows.
    """
    hashes: dict[str, Any] = {}
    counts = np.zeros(len(metadata.class_names), dtype=np.int64)
    rows = 0
    names: tuple[str, ...] | None = None
    for chunk in chunks:
        stored = chunk.embeddings.astype(precision)
        if precision == "float16":
            chunk = dataclasses.replace(chunk, embeddings=stored.astype(np.float32))
        if chunk.metadata.task != metadata.task:
            raise DataError(f"embedding set: expected labels of a {metadata.task} task, found {chunk.metadata.task}")
        validate("embedding set", chunk, rows)
        content = _content(chunk, stored)
        if names is not None and tuple(content) != names:
            raise DataError(f"embedding set: chunks differ in their columns ({tuple(content)}, {names})")
        names = tuple(content)
        for name, raw in content.items():
            hashes.setdefault(name, hashlib.sha256()).update(raw)
        counts += counts_of(chunk.labels, counts.size)
        rows += len(chunk)
    if rows == 0 or names is None:
        raise DataError("embedding set: expected at least one record, found none")
    whole = hashlib.sha256(f"{FORMAT} {metadata.identity.fingerprint()} {precision} {rows}".encode())
    if metadata.task != "multiclass":  # sets from before there were tasks keep their fingerprint
        whole.update(f" task={metadata.task}".encode())
    for name in sorted(hashes):
        whole.update(f" {name}={hashes[name].hexdigest()}".encode())
    return whole.hexdigest(), tuple(int(count) for count in counts), rows, names


def _content(chunk: EmbeddingSet, stored: NDArray[Any]) -> dict[str, bytes]:
    kind = "i1" if chunk.metadata.task == "multilabel" else "<i8"
    content = {"embedding": stored.tobytes(), "label": chunk.labels.astype(kind).tobytes()}
    if chunk.groups is not None:
        content["patient"] = chunk.groups.astype("<i8").tobytes()
    if chunk.splits is not None:
        content["split"] = "".join(f"{len(value)}:{value}" for value in chunk.splits).encode()
    for name, values in chunk.columns.items():
        content[name] = "".join(f"{len(value)}:{value}" for value in values).encode()
    if chunk.keys is not None:
        content["key"] = chunk.keys.tobytes()
    return content


def validate(where: str, data: EmbeddingSet, offset: int = 0) -> None:
    """Check the values of a set.

    Args:
        where: the file or set, for messages.
        data: the set.
        offset: number of its first row, for messages.

    Raises:
        DataError: rows that are not finite or all zero, labels outside the classes, findings that are not 1, 0 or -1,
            or unknown splits, with row numbers.
    """
    if data.embeddings.ndim != 2 or data.dimension != data.metadata.identity.dimension:
        raise DataError(
            f"{where}: expected embeddings of width {data.metadata.identity.dimension}, found shape "
            f"{data.embeddings.shape}"
        )
    columns = [data.groups, data.splits, data.keys, *data.columns.values()]
    lengths = {len(data.embeddings), *(len(column) for column in columns if column is not None)}
    if lengths != {len(data)}:
        raise DataError(f"{where}: expected columns of {len(data)} rows each, found {sorted(lengths)}")
    bad = np.flatnonzero(~np.isfinite(data.embeddings).all(axis=1)) + offset
    if bad.size:
        raise DataError(
            f"{where}: {bad.size} rows hold values that are not finite (NaN or infinite): row {_some(bad)} "
            f"(from 0); "
            "remove them or extract them again"
        )
    zero = np.flatnonzero(~data.embeddings.any(axis=1)) + offset
    if zero.size:
        raise DataError(
            f"{where}: embeddings must not be all zero, found {zero.size} such rows: row {_some(zero)} (from 0); "
            "remove them or extract them again"
        )
    _validate_labels(where, data, offset)
    if data.splits is not None and not np.isin(data.splits, SPLIT_NAMES).all():
        found = sorted(set(data.splits) - set(SPLIT_NAMES))
        raise DataError(f"{where}: expected splits of {', '.join(SPLIT_NAMES)}; found {found[0]!r}")


def usable_labels(data: EmbeddingSet) -> NDArray[np.bool_]:
    """Which rows have a label that their task knows: (n,); the labels have the task's shape."""
    if data.metadata.task == "multilabel":
        return np.asarray(((data.labels >= -1) & (data.labels <= 1)).all(axis=1))
    return (data.labels >= 0) & (data.labels < data.num_classes)


def _validate_labels(where: str, data: EmbeddingSet, offset: int) -> None:
    multilabel = data.metadata.task == "multilabel"
    shape = (len(data), data.num_classes) if multilabel else (len(data),)
    kind = np.dtype(np.int8) if multilabel else np.dtype(np.int64)
    if data.labels.shape != shape or data.labels.dtype != kind:
        raise DataError(
            f"{where}: expected labels of a {data.metadata.task} task as {kind} of shape {shape}, found "
            f"{data.labels.dtype} of shape {data.labels.shape}"
        )
    outside = ~usable_labels(data)
    if outside.any() and multilabel:
        raise DataError(
            f"{where}: {int(outside.sum())} rows have a finding that is not 1 (present), 0 (absent) or -1 (unknown): "
            f"row {_some(np.flatnonzero(outside) + offset)}; correct the label file"
        )
    if outside.any():
        rows = np.flatnonzero(outside) + offset
        raise DataError(
            f"{where}: {rows.size} labels lie outside the {data.num_classes} classes (expected 0.."
            f"{data.num_classes - 1}): row {_some(rows)} has {int(data.labels[outside][0])}; correct the "
            f"label file"
        )


def _some(rows: NDArray[np.int64]) -> str:
    shown = ", ".join(str(row) for row in rows[:_ROWS_SHOWN])
    return shown if rows.size <= _ROWS_SHOWN else f"{shown}, ..."


def regroup(chunks: Iterable[EmbeddingSet], size: int) -> Iterator[EmbeddingSet]:
    """Cut chunks again, so that all but the last have the same size however the rows arrived.

    Args:
        chunks: sets with the same columns and metadata.
        size: rows per chunk, >= 1.

    Yields:
        Sets of `size` rows; the last may be smaller.
    """
    held: list[EmbeddingSet] = []
    for chunk in chunks:
        held.append(chunk)
        while sum(map(len, held)) >= size:
            joined = concatenate(held)
            yield joined.rows(slice(0, size))
            held = [joined.rows(slice(size, None))] if len(joined) > size else []
    if held:
        yield concatenate(held)


def concatenate(parts: list[EmbeddingSet]) -> EmbeddingSet:
    """Join sets with the same columns; the metadata is the first one's."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def joined(values: list[Any]) -> Any:
        return None if values[0] is None else np.concatenate(values)

    return EmbeddingSet(
        embeddings=np.concatenate([part.embeddings for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        metadata=first.metadata,
        groups=joined([part.groups for part in parts]),
        splits=joined([part.splits for part in parts]),
        columns={name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns},
        keys=joined([part.keys for part in parts]),
    )
