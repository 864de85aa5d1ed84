"""The writing of an embedding set as a parquet file: whole or not at all. `file.py` says what it holds."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.durable import whole_file
from common.errors import DataError
from common.names import Task
from common.texts import is_text
from embeddings.store.sets import FORMAT, EmbeddingSet, SetMetadata, regroup, survey

METADATA_KEY = b"fedhypevae"
ROW_GROUP = 512  # small, since a row group is what a reader or writer holds in memory


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
    check_path(path)
    if precision not in ("float16", "float32"):
        raise DataError(f"store precision: expected float16 or float32, found {precision!r}")
    fingerprint, counts, rows, columns = survey(chunks(), metadata, precision)
    full = dataclasses.replace(
        metadata, class_counts=counts, created=metadata.created or _now(), fingerprint=fingerprint
    )
    schema = _schema(full, precision, columns, rows)
    try:
        with whole_file(path) as file:
            texts = [field.name for field in schema if field.type == pa.string()]
            with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=texts) as writer:
                for chunk in regroup(chunks(), ROW_GROUP):
                    writer.write_table(_table(chunk, schema), row_group_size=ROW_GROUP)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: can't write the store ({reason}); nothing was replaced") from None
    return fingerprint


def check_path(path: Path) -> None:
    """Refuse (DataError) a place that Arrow could not read again: it opens names in UTF-8 alone."""
    if not is_text(str(path)):
        raise DataError(f"{path}: a store's path must be in UTF-8: choose another place")


def content_fingerprint(chunks: Iterable[EmbeddingSet], metadata: SetMetadata, precision: str = "float32") -> str:
    """Return the fingerprint a store of these rows would have; raises `DataError` as `write_store` does."""
    return survey(chunks, metadata, precision)[0]


def label_kind(task: Task, num_classes: int) -> Any:
    """How labels lie in a file: whole numbers, or for a multi-label task a list of K int8."""
    return pa.list_(pa.int8(), num_classes) if task == "multilabel" else pa.int64()


def _schema(metadata: SetMetadata, precision: str, columns: tuple[str, ...], rows: int) -> Any:
    value = pa.float16() if precision == "float16" else pa.float32()
    kinds = {
        "embedding": pa.list_(value, metadata.identity.dimension),
        "label": label_kind(metadata.task, len(metadata.class_names)),
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
            "task": metadata.task,
        },
        sort_keys=True,
    )
    fields = [pa.field(name, kinds.get(name, pa.string()), nullable=False) for name in columns]
    return pa.schema(fields, metadata={METADATA_KEY: text.encode()})


def _table(chunk: EmbeddingSet, schema: Any) -> Any:
    arrays = []
    for field in schema:
        if field.name == "embedding":
            kind = np.float16 if field.type.value_type == pa.float16() else np.float32
            flat = pa.array(np.ascontiguousarray(chunk.embeddings, dtype=kind).ravel())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, field.type.list_size))
        elif field.name == "label" and chunk.labels.ndim == 2:
            flat = pa.array(np.ascontiguousarray(chunk.labels).ravel())
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
