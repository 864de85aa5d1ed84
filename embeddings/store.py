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
import json
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.durable import sync_path
from common.errors import DataError
from common.identity import EncoderIdentity
from embeddings.sets import FORMAT, SPLIT_NAMES, EmbeddingSet, SetMetadata, regroup, survey, validate

_METADATA_KEY = b"fedhypevae"
_RESERVED = ("embedding", "label", "patient", "split", "key")
ROW_GROUP = 512  # small, since a row group is what a reader or writer holds in memory
__all__ = [
    "SPLIT_NAMES",
    "EmbeddingSet",
    "SetMetadata",
    "content_fingerprint",
    "iterate_store",
    "read_head",
    "read_metadata",
    "read_store",
    "read_usable",
    "stored_precision",
    "write_chunks",
    "write_store",
]


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


def write_chunks(
    path: Path,
    chunks: Callable[[], Iterable[EmbeddingSet]],
    metadata: SetMetadata,
    *,
    precision: str = "float32",
) -> str:
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
    fingerprint, counts, rows, columns = survey(chunks(), metadata.identity, precision)
    full = dataclasses.replace(
        metadata, class_counts=counts, created=metadata.created or _now(), fingerprint=fingerprint
    )
    schema = _schema(full, precision, columns, rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            texts = [field.name for field in schema if field.type == pa.string()]
            with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=texts) as writer:
                for chunk in regroup(chunks(), ROW_GROUP):
                    writer.write_table(_table(chunk, schema), row_group_size=ROW_GROUP)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_path(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: can't write the store ({reason}); nothing was replaced") from None
    finally:
        temporary.unlink(missing_ok=True)
    return fingerprint


def content_fingerprint(chunks: Iterable[EmbeddingSet], identity: EncoderIdentity, precision: str = "float32") -> str:
    """Return the fingerprint a store of these rows would have; raises `DataError` as `write_store` does."""
    return survey(chunks, identity, precision)[0]


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
    validate(str(path), data, 0)
    found, *_ = survey(iter([data]), metadata.identity, precision)
    if found != metadata.fingerprint:
        raise DataError(
            f"{path}: the content does not match its fingerprint (expected {metadata.fingerprint[:16]}, "
            f"found "
            f"{found[:16]}); the file was changed after it was written: extract it again"
        )
    return data


def read_usable(path: Path) -> EmbeddingSet:
    """The rows of a site's set that a run can use, for the run itself: whether it goes on must not depend on a row.

    A row is left out by itself: an empty cell, a value that is not finite, no value but zeros, or a label of no class.
    The fingerprint is not held against the content either. `read_store` refuses all these, before any run.

    Returns:
        The set, embeddings as float32; it may be empty.

    Raises:
        DataError: the file is missing, no parquet or not of this format.
    """
    with _opened(path) as file:
        metadata, _ = _metadata(path, file)
        data = _chunk(path, _without_empty(file.read()), metadata)
    usable = np.isfinite(data.embeddings).all(axis=1) & data.embeddings.any(axis=1)
    usable &= (data.labels >= 0) & (data.labels < data.num_classes)
    return data if usable.all() else data.take(usable)


def iterate_store(path: Path) -> Iterator[EmbeddingSet]:
    """Yield a store in chunks (its row groups), in constant memory; without the checks of `read_store`."""
    with _opened(path) as file:
        metadata, _ = _metadata(path, file)
        for group in range(file.num_row_groups):
            yield _chunk(path, file.read_row_group(group), metadata)


def read_metadata(path: Path) -> SetMetadata:
    """Read a store's metadata without its rows; raises `DataError` as `read_store` does."""
    return read_head(path)[0]


def read_head(path: Path) -> tuple[SetMetadata, tuple[str, ...]]:
    """As `read_metadata`, with the names of the columns."""
    with _opened(path) as file:
        return _metadata(path, file)[0], tuple(file.schema_arrow.names)


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
        raise DataError(f"{path}: expected an embedding store, but {what} is missing; make one with fedhypevae embed")
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or str(kind.value_type) not in ("halffloat", "float"):
        raise DataError(f"{path}: expected `embedding` as a fixed-size list of float16 or float32, found {kind}")
    for name, wanted in (("label", pa.int64()), ("patient", pa.int64()), ("split", pa.string())):
        if name in schema.names and schema.field(name).type != wanted:
            raise DataError(f"{path}: expected the column {name} as {wanted}, found {schema.field(name).type}")
    try:
        value = json.loads(raw)
        if value["format"] != FORMAT:
            raise DataError(f"{path}: expected the format {FORMAT}, found {value['format']}; extract it again")
        metadata = SetMetadata(
            identity=EncoderIdentity.from_json(value["identity"]),
            class_counts=tuple(value["class_counts"]),
            created=value["created"],
            fingerprint=value["fingerprint"],
            canary=value["canary"],
            notes=value["notes"],
        )
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: the store's metadata can't be read; extract it again") from None
    if kind.list_size != metadata.identity.dimension:
        raise DataError(f"{path}: expected embeddings of width {metadata.identity.dimension}, found {kind.list_size}")
    return metadata, "float16" if str(kind.value_type) == "halffloat" else "float32"


def _chunk(path: Path, table: Any, metadata: SetMetadata) -> EmbeddingSet:
    for name in table.column_names:
        if table.column(name).null_count:
            raise DataError(f"{path}: column {name} has {table.column(name).null_count} empty cells; expected none")
    if _has_gaps(table):
        raise DataError(f"{path}: column embedding has empty values within its rows; expected none")
    table = table.combine_chunks()
    width = table.schema.field("embedding").type.list_size
    flat = _flat(table.column("embedding"))
    return EmbeddingSet(
        embeddings=flat.reshape(-1, width).astype(np.float32),
        labels=_numbers(table.column("label")).astype(np.int64),
        metadata=metadata,
        groups=_numbers(table.column("patient")).astype(np.int64) if "patient" in table.column_names else None,
        splits=_texts(table.column("split")) if "split" in table.column_names else None,
        columns={name: _texts(table.column(name)) for name in table.column_names if name not in _RESERVED},
        keys=_keys(table) if "key" in table.column_names else None,
    )


def _has_gaps(table: Any) -> bool:
    return any(chunk.values.null_count for chunk in table.column("embedding").chunks)


def _without_empty(table: Any) -> Any:
    """The rows without an empty cell, of a store or within an embedding; `_chunk` refuses those."""
    empty = np.zeros(table.num_rows, dtype=bool)
    for name in table.column_names:
        column = table.column(name)
        if column.null_count:
            empty |= np.asarray(column.is_null().to_pylist(), dtype=bool)
    if _has_gaps(table):
        rows = table.column("embedding").to_pylist()
        empty |= np.asarray([row is None or None in row for row in rows], dtype=bool)
    return table.take(np.flatnonzero(~empty)) if empty.any() else table


def _flat(column: Any) -> NDArray[Any]:
    # not `flatten`, which imports all of Arrow's compute functions: no cell is null here
    width = column.type.list_size
    parts = [np.from_dlpack(chunk.values.slice(chunk.offset * width, len(chunk) * width)) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _numbers(column: Any) -> NDArray[Any]:
    """A column without nulls; Arrow's own `to_numpy` imports pandas, in every process that a message starts."""
    parts = [np.from_dlpack(chunk) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _texts(column: Any) -> NDArray[np.str_]:
    return np.asarray(column.to_pylist(), dtype=np.str_)


def _keys(table: Any) -> NDArray[np.uint8]:
    raw = b"".join(table.column("key").to_pylist())
    return np.frombuffer(raw, dtype=np.uint8).reshape(table.num_rows, -1)


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
            "canary": metadata.canary,
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
