"""The embedding set of a site, in memory and as a parquet file.

A file holds `embedding` (fixed-size list of float16 or float32), `label` (int64), and optionally `patient`
(int64, a salted hash), `split` (text), further text columns asked for (such as the acquisition site) and
`key` (a salted hash by which a second extraction knows the images it has). The schema's metadata holds the
encoder's identity, the class names and counts, the time of creation and a fingerprint over the content. No
file name, patient identifier or header value is stored. Imports numpy and pyarrow alone, so that a client
starts fast.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.errors import DataError
from embeddings.identity import EncoderIdentity

SPLIT_NAMES = ("train", "validation", "test")
FORMAT = "fedhypevae-embeddings/1"
_METADATA_KEY = b"fedhypevae"
_RESERVED = ("embedding", "label", "patient", "split", "key")
_ROWS_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class SetMetadata:
    """What a set knows of itself. `fingerprint` is over the content; it is filled in on writing."""

    identity: EncoderIdentity
    class_counts: tuple[int, ...] = ()
    created: str = ""
    fingerprint: str = ""
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""
        return self.identity.class_names


@dataclasses.dataclass(frozen=True)
class EmbeddingSet:
    """Labelled embeddings of one site (or a simulation's pool).

    `embeddings` (n, d) float32; `labels` (n,) int64 in 0..K-1; `groups` (n,) int64, one number per patient,
    or None; `splits` (n,) of `SPLIT_NAMES`, or None; `columns` further text columns; `keys` (n, 16) uint8, or
    None.
    """

    embeddings: NDArray[np.float32]
    labels: NDArray[np.int64]
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
        """Number of classes, those without a record included."""
        return len(self.metadata.class_names)

    def take(self, rows: NDArray[Any]) -> EmbeddingSet:
        """Return the set of the given rows (indices or a mask), with the class counts of those rows."""
        labels = self.labels[rows]
        counts = tuple(int(count) for count in np.bincount(labels, minlength=self.num_classes))
        return EmbeddingSet(
            embeddings=self.embeddings[rows],
            labels=labels,
            metadata=dataclasses.replace(self.metadata, class_counts=counts, fingerprint=""),
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


def write_store(path: Path, data: EmbeddingSet, *, precision: str = "float32") -> str:
    """Write a set as parquet: whole or not at all.

    Args:
        path: the file to write; an existing one is replaced.
        data: the set; it is validated first.
        precision: `float32`, or `float16` for half the size.

    Returns:
        The fingerprint of the content.

    Raises:
        DataError: the set is empty, has non-finite rows or labels outside its classes, or the disk is full.
    """
    return write_chunks(path, lambda: iter([data]), data.metadata, precision=precision)


def write_chunks(path: Path, chunks: Any, metadata: SetMetadata, *, precision: str = "float32") -> str:
    """Write a set that comes in chunks, in constant memory: one pass for the fingerprint, one to write.

    Args:
        path: the file to write; an existing one is replaced when all is on disk.
        chunks: function that returns an iterator over `EmbeddingSet`s with the same columns; called twice.
        metadata: the identity and notes; counts, time (when empty) and fingerprint are filled in.
        precision: `float32` or `float16`.

    Returns:
        The fingerprint of the content.

    Raises:
        DataError: a chunk has non-finite rows or labels outside the classes; no rows at all; the disk is
            full.
    """
    if precision not in ("float16", "float32"):
        raise DataError(f"store precision: expected float16 or float32, found {precision!r}")
    fingerprint, counts, rows, columns = _survey(chunks(), metadata.identity, precision)
    full = dataclasses.replace(
        metadata, class_counts=counts, created=metadata.created or _now(), fingerprint=fingerprint
    )
    schema = _schema(full, precision, columns, rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for chunk in chunks():
                    writer.write_table(_table(chunk, schema), row_group_size=max(len(chunk), 1))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: can't write the store ({reason}); nothing was replaced") from None
    finally:
        temporary.unlink(missing_ok=True)
    return fingerprint


def read_store(path: Path) -> EmbeddingSet:
    """Read and validate a site's set.

    Args:
        path: a parquet file of `write_store`.

    Returns:
        The set, embeddings as float32.

    Raises:
        DataError: the file is missing, no parquet or not of this format; it has no rows; rows are not finite
            (named by number, from 0) or have labels outside the class set; the content does not match its
            fingerprint.
    """
    with _opened(path) as file:
        metadata, precision = _metadata(path, file)
        data = _chunk(path, file.read(), metadata)
    if len(data) == 0:
        raise DataError(f"{path}: expected at least one record, found none")
    _validate(str(path), data, 0)
    found, *_ = _survey(iter([data]), metadata.identity, precision)
    if found != metadata.fingerprint:
        raise DataError(
            f"{path}: the content does not match its fingerprint (expected {metadata.fingerprint[:16]}, "
            f"found "
            f"{found[:16]}); the file was changed after it was written: extract it again"
        )
    return data


def iterate_store(path: Path) -> Iterator[EmbeddingSet]:
    """Yield a store in chunks (its row groups), in constant memory; without the checks of `read_store`."""
    with _opened(path) as file:
        metadata, _ = _metadata(path, file)
        for group in range(file.num_row_groups):
            yield _chunk(path, file.read_row_group(group), metadata)


def read_metadata(path: Path) -> SetMetadata:
    """Read a store's metadata without its rows; raises `DataError` as `read_store` does."""
    with _opened(path) as file:
        return _metadata(path, file)[0]


def stored_precision(path: Path) -> str:
    """Return `float16` or `float32`: how the embeddings lie in the file."""
    with _opened(path) as file:
        return _metadata(path, file)[1]


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: expected an embedding store (parquet), found no such file")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected an embedding store (parquet); it can't be read: {error}") from None


def _metadata(path: Path, file: Any) -> tuple[SetMetadata, str]:
    schema = file.schema_arrow
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    missing = [name for name in ("embedding", "label") if name not in schema.names]
    if raw is None or missing:
        what = f"the column {missing[0]}" if missing else "the project's metadata"
        raise DataError(
            f"{path}: expected an embedding store, but {what} is missing; make one with fedhypevae embed"
        )
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or str(kind.value_type) not in ("halffloat", "float"):
        raise DataError(
            f"{path}: expected `embedding` as a fixed-size list of float16 or float32, found {kind}"
        )
    try:
        value = json.loads(raw)
        metadata = SetMetadata(
            identity=EncoderIdentity.from_json(value["identity"]),
            class_counts=tuple(value["class_counts"]),
            created=value["created"],
            fingerprint=value["fingerprint"],
            notes=value["notes"],
        )
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: the store's metadata can't be read; extract it again") from None
    return metadata, "float16" if str(kind.value_type) == "halffloat" else "float32"


def _chunk(path: Path, table: Any, metadata: SetMetadata) -> EmbeddingSet:
    for name in table.column_names:
        if table.column(name).null_count:
            raise DataError(
                f"{path}: column {name} has {table.column(name).null_count} empty cells; expected none"
            )
    table = table.combine_chunks()
    width = table.schema.field("embedding").type.list_size
    flat = _flat(table.column("embedding"))
    data = EmbeddingSet(
        embeddings=flat.reshape(-1, width).astype(np.float32),
        labels=table.column("label").to_numpy().astype(np.int64),
        metadata=metadata,
        groups=table.column("patient").to_numpy().astype(np.int64)
        if "patient" in table.column_names
        else None,
        splits=_texts(table.column("split")) if "split" in table.column_names else None,
        columns={name: _texts(table.column(name)) for name in table.column_names if name not in _RESERVED},
        keys=_keys(table) if "key" in table.column_names else None,
    )
    if data.dimension != metadata.identity.dimension:
        raise DataError(
            f"{path}: expected embeddings of width {metadata.identity.dimension}, found {data.dimension}"
        )
    return data


def _flat(column: Any) -> NDArray[Any]:
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _texts(column: Any) -> NDArray[np.str_]:
    return np.asarray(column.to_pylist(), dtype=np.str_)


def _keys(table: Any) -> NDArray[np.uint8]:
    raw = b"".join(table.column("key").to_pylist())
    return np.frombuffer(raw, dtype=np.uint8).reshape(table.num_rows, -1)


def _validate(where: str, data: EmbeddingSet, offset: int) -> None:
    bad = np.flatnonzero(~np.isfinite(data.embeddings).all(axis=1)) + offset
    if bad.size:
        raise DataError(
            f"{where}: {bad.size} rows hold values that are not finite (NaN or infinite): row {_some(bad)} "
            f"(from 0); "
            "remove them or extract them again"
        )
    outside = (data.labels < 0) | (data.labels >= data.num_classes)
    if outside.any():
        rows = np.flatnonzero(outside) + offset
        raise DataError(
            f"{where}: {rows.size} labels lie outside the {data.num_classes} classes (expected 0.."
            f"{data.num_classes - 1}): row {_some(rows)} has {int(data.labels[outside][0])}; correct the "
            f"label file"
        )
    if data.splits is not None and not np.isin(data.splits, SPLIT_NAMES).all():
        found = sorted(set(data.splits) - set(SPLIT_NAMES))
        raise DataError(f"{where}: expected splits of {', '.join(SPLIT_NAMES)}; found {found[0]!r}")


def _some(rows: NDArray[np.int64]) -> str:
    shown = ", ".join(str(row) for row in rows[:_ROWS_SHOWN])
    return shown if rows.size <= _ROWS_SHOWN else f"{shown}, ..."


def _survey(
    chunks: Iterable[EmbeddingSet], identity: EncoderIdentity, precision: str
) -> tuple[str, tuple[int, ...], int, tuple[str, ...]]:
    """Validate chunks; return fingerprint (the same however rows are cut), class counts, rows, columns."""
    hashes: dict[str, Any] = {}
    counts = np.zeros(len(identity.class_names), dtype=np.int64)
    rows = 0
    names: tuple[str, ...] | None = None
    for chunk in chunks:
        stored = chunk.embeddings.astype(precision)
        if precision == "float16":
            chunk = dataclasses.replace(chunk, embeddings=stored.astype(np.float32))
        _validate("embedding set", chunk, rows)
        content = _content(chunk, stored)
        if names is not None and tuple(content) != names:
            raise DataError(f"embedding set: chunks differ in their columns ({tuple(content)}, {names})")
        names = tuple(content)
        for name, raw in content.items():
            hashes.setdefault(name, hashlib.sha256()).update(raw)
        counts += np.bincount(chunk.labels, minlength=counts.size)
        rows += len(chunk)
    if rows == 0 or names is None:
        raise DataError("embedding set: expected at least one record, found none")
    whole = hashlib.sha256(f"{FORMAT} {identity.fingerprint()} {precision} {rows}".encode())
    for name in sorted(hashes):
        whole.update(f" {name}={hashes[name].hexdigest()}".encode())
    return whole.hexdigest(), tuple(int(count) for count in counts), rows, names


def _content(chunk: EmbeddingSet, stored: NDArray[Any]) -> dict[str, bytes]:
    content = {"embedding": stored.tobytes(), "label": chunk.labels.astype("<i8").tobytes()}
    if chunk.groups is not None:
        content["patient"] = chunk.groups.astype("<i8").tobytes()
    if chunk.splits is not None:
        content["split"] = "".join(f"{len(value)}:{value}" for value in chunk.splits).encode()
    for name, values in chunk.columns.items():
        content[name] = "".join(f"{len(value)}:{value}" for value in values).encode()
    if chunk.keys is not None:
        content["key"] = chunk.keys.tobytes()
    return content


def _schema(metadata: SetMetadata, precision: str, columns: tuple[str, ...], rows: int) -> Any:
    value = pa.float16() if precision == "float16" else pa.float32()
    kinds = {
        "embedding": pa.list_(value, metadata.identity.dimension),
        "label": pa.int64(),
        "patient": pa.int64(),
        "key": pa.binary(16),
    }
    text = json.dumps(
        {
            "format": FORMAT,
            "identity": metadata.identity.to_json(),
            "class_counts": list(metadata.class_counts),
            "created": metadata.created,
            "fingerprint": metadata.fingerprint,
            "rows": rows,
            "notes": dict(metadata.notes),
        },
        sort_keys=True,
    )
    fields = [pa.field(name, kinds.get(name, pa.string()), nullable=False) for name in columns]
    return pa.schema(fields, metadata={_METADATA_KEY: text.encode()})


def _table(chunk: EmbeddingSet, schema: Any) -> Any:
    arrays = []
    for field in schema:
        if field.name == "embedding":
            kind = np.float16 if field.type.value_type == pa.float16() else np.float32
            flat = pa.array(np.ascontiguousarray(chunk.embeddings, dtype=kind).ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, field.type.list_size))
        elif field.name == "key":
            arrays.append(
                pa.array([] if chunk.keys is None else [row.tobytes() for row in chunk.keys], type=field.type)
            )
        else:
            values: Any = {"label": chunk.labels, "patient": chunk.groups, "split": chunk.splits}.get(
                field.name, chunk.columns.get(field.name)
            )
            arrays.append(pa.array(values, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _now() -> str:
    """Return the time in UTC; `SOURCE_DATE_EPOCH` fixes it, so that two runs can write the same bytes."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    return moment.isoformat(timespec="seconds")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
