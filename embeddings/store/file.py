"""The embedding set of a site, in memory and as a parquet file.

A file holds `embedding` (fixed-size list of float16 or float32), `label` (int64; of a multi-label set a fixed-size
list of K int8, with 1 for present, 0 for absent and -1 for unknown), and optionally `patient`
(int64, a salted hash), `split` (text), further text columns asked for (such as the acquisition site) and
`key` (a salted hash by which a second extraction knows the images it has). The schema's metadata holds the
encoder's identity, the task, the class names and counts, the time of creation and a fingerprint over the content. No
file name, patient identifier or header value is stored. Imports numpy and pyarrow alone, so that a client
starts fast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.errors import DataError
from common.names import TASKS
from common.wire.identity import EncoderIdentity
from embeddings.bounded import check_sizes, read_texts
from embeddings.store.sets import FORMAT, RESERVED, EmbeddingSet, SetMetadata, survey, usable_labels, validate
from embeddings.store.writing import METADATA_KEY, label_kind


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
        check_sizes(path, file)
        data = _chunk(path, _read(path, file.read), metadata)
    if len(data) == 0:
        raise DataError(f"{path}: expected at least one record, found none")
    validate(str(path), data, 0)
    found, *_ = survey(iter([data]), metadata, precision)
    if found != metadata.fingerprint:
        raise DataError(
            f"{path}: the content does not match its fingerprint (expected {metadata.fingerprint[:16]}, "
            f"found "
            f"{found[:16]}); the file was changed after it was written: extract it again"
        )
    return data


def read_usable(path: Path) -> EmbeddingSet:
    """The rows of a site's set that a run can use, for the run itself: whether it goes on must not depend on a row.

    A row is left out by itself: an empty cell, a value that is not finite, no value but zeros, or a label of no class
    (a finding that is not -1, 0 or 1). A text that is too long is cut. Neither the fingerprint nor the limits of memory
    are held against the content.
    `read_store` refuses all these, before any run.

    Returns:
        The set, embeddings as float32; it may be empty.

    Raises:
        DataError: the file is missing, no parquet or not of this format.
    """
    with _opened(path) as file:
        metadata, _ = _metadata(path, file)
        data = _chunk(path, _without_empty(file.read()), metadata, whole_texts=False)
    usable = np.isfinite(data.embeddings).all(axis=1) & data.embeddings.any(axis=1)
    usable &= usable_labels(data)
    return data if usable.all() else data.take(usable)


def iterate_store(path: Path) -> Iterator[EmbeddingSet]:
    """Yield a store in chunks (its row groups), in constant memory; without the checks of `read_store`."""
    with _opened(path) as file:
        metadata, _ = _metadata(path, file)
        check_sizes(path, file)
        for group in range(file.num_row_groups):
            yield _chunk(path, _read(path, lambda: file.read_row_group(group)), metadata)  # noqa: B023


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

    def opened() -> Any:
        texts = [field.name for field in pq.read_schema(path) if field.type == pa.string()]
        return pq.ParquetFile(path, read_dictionary=texts)  # a text that many rows share is held once

    return _read(path, opened)


def _read(path: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: expected an embedding store (parquet); it can't be read: {reason}") from None


def _metadata(path: Path, file: Any) -> tuple[SetMetadata, str]:
    schema = file.schema_arrow
    raw = (schema.metadata or {}).get(METADATA_KEY)
    missing = [name for name in ("embedding", "label") if name not in schema.names]
    if raw is None or missing:
        what = f"the column {missing[0]}" if missing else "the project's metadata"
        raise DataError(f"{path}: expected an embedding store, but {what} is missing; make one with fedhypevae embed")
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {twice[0]} comes twice: remove one of them, or extract the set again")
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or str(kind.value_type) not in ("halffloat", "float"):
        raise DataError(f"{path}: expected `embedding` as a fixed-size list of float16 or float32, found {kind}")
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
            task=value.get("task", TASKS[0]),  # sets from before there were tasks have one class a record
        )
        if metadata.task not in TASKS:
            raise DataError(f"{path}: expected a task of {', '.join(TASKS)}, found {metadata.task!r}; extract it again")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: the store's metadata can't be read; extract it again") from None
    label = label_kind(metadata.task, len(metadata.class_names))
    for name, wanted in (("label", label), ("patient", pa.int64()), ("split", pa.string())):
        if name in schema.names and _kind(schema.field(name)) != wanted:
            raise DataError(f"{path}: expected the column {name} as {wanted}, found {_kind(schema.field(name))}")
    if kind.list_size != metadata.identity.dimension:
        raise DataError(f"{path}: expected embeddings of width {metadata.identity.dimension}, found {kind.list_size}")
    return metadata, "float16" if str(kind.value_type) == "halffloat" else "float32"


def _kind(field: Any) -> Any:
    """What a column holds; texts are read as a dictionary."""
    return field.type.value_type if pa.types.is_dictionary(field.type) else field.type


def _chunk(path: Path, table: Any, metadata: SetMetadata, *, whole_texts: bool = True) -> EmbeddingSet:
    for name in table.column_names:
        if table.column(name).null_count:
            raise DataError(f"{path}: column {name} has {table.column(name).null_count} empty cells; expected none")
    for name in _lists(table):
        if _has_gaps(table.column(name)):
            raise DataError(f"{path}: column {name} has empty values within its rows; expected none")
    table = table.combine_chunks()

    def texts(name: str) -> NDArray[np.str_]:
        return read_texts(path, table.column(name), whole=whole_texts)

    lists = {name: _flat(table.column(name)) for name in _lists(table)}
    return EmbeddingSet(
        embeddings=lists["embedding"].astype(np.float32),
        labels=lists["label"].astype(np.int8) if "label" in lists else _numbers(table.column("label")).astype(np.int64),
        metadata=metadata,
        groups=_numbers(table.column("patient")).astype(np.int64) if "patient" in table.column_names else None,
        splits=texts("split") if "split" in table.column_names else None,
        columns={name: texts(name) for name in table.column_names if name not in RESERVED},
        keys=_keys(table) if "key" in table.column_names else None,
    )


def _lists(table: Any) -> list[str]:
    return [name for name in ("embedding", "label") if pa.types.is_fixed_size_list(table.schema.field(name).type)]


def _has_gaps(column: Any) -> bool:
    return any(chunk.values.null_count for chunk in column.chunks)


def _without_empty(table: Any) -> Any:
    """The rows without an empty cell, of a store or within an embedding; `_chunk` refuses those."""
    empty = np.zeros(table.num_rows, dtype=bool)
    for name in table.column_names:
        column = table.column(name)
        if column.null_count:
            empty |= np.asarray(column.is_null().to_pylist(), dtype=bool)
    for name in _lists(table):
        if _has_gaps(table.column(name)):
            rows = table.column(name).to_pylist()
            empty |= np.asarray([row is None or None in row for row in rows], dtype=bool)
    return table.take(np.flatnonzero(~empty)) if empty.any() else table


def _flat(column: Any) -> NDArray[Any]:
    # not `flatten`, which imports all of Arrow's compute functions: no cell is null here
    width = column.type.list_size
    parts = [np.from_dlpack(chunk.values.slice(chunk.offset * width, len(chunk) * width)) for chunk in column.chunks]
    return np.concatenate(parts).reshape(-1, width) if parts else np.zeros((0, width), dtype=np.float32)


def _numbers(column: Any) -> NDArray[Any]:
    """A column without nulls; Arrow's own `to_numpy` imports pandas, in every process that a message starts."""
    parts = [np.from_dlpack(chunk) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _keys(table: Any) -> NDArray[np.uint8]:
    raw = b"".join(table.column("key").to_pylist())
    return np.frombuffer(raw, dtype=np.uint8).reshape(table.num_rows, -1)
