"""Synthetic rows as parquet: written block by block, read by pyarrow, pandas and `datasets` alike.

`embedding` is a fixed-size list of float32, `label` an int64 whose names `datasets` shows; of a multi-label set a
fixed-size list of K int8. The same rows give the same bytes: nothing of the time or the machine is written.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.durable import sha256_of, whole_file
from common.errors import DataError, FedHypeVAEError
from common.evaluation.scores import Split
from common.findings import are_findings
from common.methods.base import RunContext
from common.names import Task
from common.parquet_pages import pages_of

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_KEY = b"fedhypevae.synthetic"
_BATCH_VALUES = 2**24
_WRITER = re.compile(r"parquet-cpp-arrow version [0-9.]{1,20}")
_FOOTER_BYTES = 300  # a row group's part of the footer takes about 210
_BYTE_STREAM_SPLIT, _PLAIN = 9, 0
_ROW_LEVEL_BYTES = 6  # what says where a row's list begins
_PAGE_BYTES = 96  # a page's header takes about 70, what frames its levels and zstd's frame the rest
_LARGEST_PAGE = 2**21  # and two rows: the writer ends a page at 1 MiB, and looks once in 1,024 values or a row
_MARK_BYTES = 4
_FRAME_BYTES = 2 * _MARK_BYTES + 4  # the mark at both ends of a parquet file, and the length of its footer


@dataclass(frozen=True)
class Written:
    """A finished file: rows in all and of each class, or with each finding, and its size and SHA-256."""

    rows: int
    class_counts: tuple[int, ...]
    size: int
    sha256: str


def write_rows(
    path: Path,
    blocks: Iterable[Split],
    *,
    dim: int,
    class_names: Sequence[str],
    notes: Mapping[str, Any],
    task: Task = "multiclass",
) -> Written:
    """Write blocks of rows as they come, each as one row group; whole or not at all.

    Args:
        path: the new file; its folder is made if missing.
        blocks: embeddings (m, dim) float32 and labels (m,) int64, or (m, K) int8 of a multi-label set.
        dim: width of an embedding.
        class_names: names of the labels.
        task: what the labels are.
        notes: JSON values for the file's metadata, under `fedhypevae.synthetic`.

    Raises:
        FedHypeVAEError: the disk refuses; no file is left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(dim, class_names, json.dumps(notes, sort_keys=True).encode(), task)
    counts, rows = torch.zeros(len(class_names), dtype=torch.int64), 0
    try:
        # the bytes of floats apart: signs and exponents compress, the rest is noise, and a dictionary is a loss
        with (
            whole_file(path) as stream,
            pq.ParquetWriter(
                stream,
                schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=False,
                use_byte_stream_split=["embedding.list.element"],
                write_statistics=[_label_column(task)],
            ) as writer,
        ):
            for embeddings, labels in blocks:
                values = pa.array(np.ascontiguousarray(embeddings.numpy(), dtype=np.float32).ravel())
                column = pa.FixedSizeListArray.from_arrays(values, dim)
                table = pa.Table.from_arrays([column, _label_array(labels)], schema=schema)
                writer.write_table(table, row_group_size=max(len(table), 1))
                counts += label_counts(labels, len(class_names))
                rows += len(table)
    except OSError as error:
        raise FedHypeVAEError(
            f"can't write {path} ({error.strerror or error}): free the disk, then try again"
        ) from None
    return Written(rows, tuple(counts.tolist()), path.stat().st_size, sha256_of(path))


def label_counts(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Rows of each class, or with each finding: labels (n,) or (n, K) -> (K,) int64."""
    return (labels == 1).sum(0) if are_findings(labels) else torch.bincount(labels, minlength=num_classes)


def stream_rows(path: Path, dim: int, num_classes: int, task: Task = "multiclass") -> Iterator[Split]:
    """Rows of a synthetic set as they lie in the file: blocks of embeddings and labels, as `write_rows` takes them.

    Raises:
        DataError: unreadable, no rows, another width, labels out of range, or values that are not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_unpacked(path, file.metadata, dim, num_classes if task == "multilabel" else 1)
            for batch in file.iter_batches(_BATCH_VALUES // dim + 1, columns=["embedding", "label"]):
                flat = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
                embeddings = torch.tensor(flat, dtype=torch.float32).reshape(len(batch), -1)
                if task == "multilabel":
                    found = batch.column("label").flatten().to_numpy(zero_copy_only=False)
                    labels = torch.tensor(found, dtype=torch.int8).reshape(len(batch), -1)
                else:
                    labels = torch.tensor(batch.column("label").to_numpy(), dtype=torch.int64)
                _check_block(path, embeddings, labels, dim, num_classes)
                rows += len(batch)
                yield embeddings, labels
    except (OSError, pa.ArrowException, KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no synthetic set ({type(error).__name__}): fetch the bundle again") from None
    if rows == 0:
        raise DataError(f"{path} holds no rows: fetch the bundle again")


def read_notes(path: Path) -> Mapping[str, Any]:
    """What `write_rows` noted in a file's metadata; empty where it noted nothing."""
    import pyarrow.parquet as pq

    found = (pq.read_schema(path).metadata or {}).get(METADATA_KEY)
    notes = {} if found is None else json.loads(found)
    return notes if isinstance(notes, dict) else {}


def set_notes(context: RunContext, reasons: Sequence[str]) -> dict[str, Any]:
    """What a run's published set says of itself in its metadata; `reasons` are why it is not private, if it is not."""
    return {
        "synthetic": True,
        "class_names": list(context.problem.class_names),
        **({} if context.problem.task == "multiclass" else {"task": context.problem.task}),
        "private": not reasons,
        "not_private_because": list(reasons),
        "config": context.config.to_flat(),
    }


def check_layout(path: Path, dim: int, class_names: Sequence[str], task: Task = "multiclass") -> None:
    """Refuse a file with anything beside the two columns and the metadata that `write_rows` writes.

    Columns, metadata and bytes that no reader of the set looks at could hold records, as could a dictionary's values
    that no row uses. The headers of all pages are looked at before any is unpacked.

    Args:
        path: the file.
        dim: width of an embedding.
        class_names: names of the labels.

    Raises:
        DataError: another column or type, other metadata, bytes that belong to no column, or pages that `write_rows`
            would not write: packed or encoded otherwise, or larger than their rows explain.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            metadata, size, held = file.metadata, path.stat().st_size, dict(file.metadata.metadata or {})
            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(held.pop(b"ARROW:schema", b""), validate=True)))
            wanted = _schema(dim, class_names, held.get(METADATA_KEY, b""), task)
            same = file.schema_arrow.equals(wanted) and schema.equals(wanted, check_metadata=True)
            if not same or held != wanted.metadata:
                raise DataError(f"{path}: expected the columns embedding and label with their notes alone")
            if not _WRITER.fullmatch(metadata.created_by or ""):
                raise DataError(f"{path} was written by another program than `fedhypevae release`")
            # a key may stand there twice, and pyarrow shows one of the two
            shown = sum(len(key) + len(value) for key, value in (metadata.metadata or {}).items())
            if metadata.serialized_size > shown + _FOOTER_BYTES * (metadata.num_row_groups + 3):
                raise DataError(f"{path} holds more in its footer than its columns and notes need")
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            columns = sum(g.column(index).total_compressed_size for g in groups for index in range(g.num_columns))
            if columns + metadata.serialized_size + _FRAME_BYTES != size:
                raise DataError(f"{path} holds bytes that belong to no column: fetch the bundle again")
            _check_chunks(path, metadata, dim, len(class_names), task)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is no synthetic set ({type(error).__name__}): fetch the bundle again") from None


def _check_unpacked(path: Path, metadata: Any, dim: int, labels_per_row: int = 1) -> None:
    """Refuse pages that would take memory beyond a block of rows: a reader unpacks one page at a time."""
    with path.open("rb") as raw:
        for group, index in np.ndindex(metadata.num_row_groups, metadata.num_columns):
            chunk, rows = metadata.row_group(group).column(index), metadata.row_group(group).num_rows
            per_row = {"embedding": dim, "label": labels_per_row}.get(chunk.path_in_schema.split(".", 1)[0])
            if per_row is None:
                continue  # is not read
            pages = pages_of(raw, chunk, str(path))
            if pages.values != rows * per_row or pages.largest > _LARGEST_PAGE + 8 * dim:
                raise DataError(f"{path}: expected rows of width {dim} in pages of about 1 MiB: fetch the bundle again")


def _check_chunks(path: Path, metadata: Any, dim: int, num_classes: int, task: Task) -> None:
    place = _MARK_BYTES
    findings = task == "multilabel"
    values = (dim, num_classes if findings else 1)
    # an int8 is stored as four bytes; what marks the end of a row's list takes a bit a value, or little more
    widths = (4 * dim + _ROW_LEVEL_BYTES, 4 * num_classes + _ROW_LEVEL_BYTES + num_classes // 4 if findings else 8)
    largest = 1 if findings else num_classes - 1
    with path.open("rb") as raw:
        for group, index in np.ndindex(metadata.num_row_groups, 2):
            rows, chunk = metadata.row_group(group).num_rows, metadata.row_group(group).column(index)
            pages, bounds = pages_of(raw, chunk, str(path)), chunk.statistics
            size = rows * widths[index]
            # the writer ends a page at 1 MiB or 20,000 rows; twice as many are let pass
            most = size + _PAGE_BYTES * (1 + (size >> 19) + rows // 10_000) if rows else 0
            same = (
                chunk.compression == "ZSTD"
                and pages.encodings <= {_PLAIN if index else _BYTE_STREAM_SPLIT}  # so there is no dictionary
                and pages.values == chunk.num_values == rows * values[index]
                and max(pages.size, chunk.total_uncompressed_size, chunk.total_compressed_size) <= most
                and (chunk.data_page_offset == place or not rows)
                and (bounds is not None) == (index == 1 and rows > 0)
                and (bounds is None or (bounds.has_min_max and 0 <= bounds.min <= bounds.max <= largest))
            )
            if not same:
                raise DataError(
                    f"{path}: expected the pages of {chunk.path_in_schema} as `fedhypevae release` writes them, "
                    "found others, which could hold more than the rows: fetch the bundle again"
                )
            place += chunk.total_compressed_size


def _check_block(path: Path, embeddings: torch.Tensor, labels: torch.Tensor, dim: int, num_classes: int) -> None:
    if embeddings.shape != (len(labels), dim):
        raise DataError(f"{path}: expected embeddings of width {dim}, found {embeddings.shape[1]}")
    largest = 1 if are_findings(labels) else num_classes - 1
    if int(labels.min()) < 0 or int(labels.max()) > largest:
        raise DataError(f"{path}: expected labels from 0 to {largest}, found others")
    if are_findings(labels) and labels.shape != (len(embeddings), num_classes):
        raise DataError(f"{path}: expected {num_classes} findings a row, found {labels.shape[1]}")
    if not bool(torch.isfinite(embeddings).all()):
        raise DataError(f"{path} holds values that are not finite: fetch the bundle again")


def _label_column(task: Task) -> str:
    return "label.list.element" if task == "multilabel" else "label"


def _label_array(labels: torch.Tensor) -> Any:
    import pyarrow as pa

    if not are_findings(labels):
        return pa.array(labels.numpy())
    return pa.FixedSizeListArray.from_arrays(pa.array(labels.contiguous().numpy().ravel()), labels.shape[1])


def _schema(dim: int, class_names: Sequence[str], notes: bytes, task: Task = "multiclass") -> pa.Schema:
    import pyarrow as pa

    metadata = {METADATA_KEY: notes, b"huggingface": _features(dim, class_names, task).encode()}
    label = pa.list_(pa.int8(), len(class_names)) if task == "multilabel" else pa.int64()
    kinds = [pa.field("embedding", pa.list_(pa.float32(), dim)), pa.field("label", label)]
    return pa.schema(kinds, metadata=metadata)


def _features(dim: int, class_names: Sequence[str], task: Task) -> str:
    """The columns in the words of `datasets`, so that labels show their names."""
    label: dict[str, Any] = {"names": list(class_names), "_type": "ClassLabel"}
    if task == "multilabel":  # one number a finding, in the order of the names in the notes
        label = {"feature": {"dtype": "int8", "_type": "Value"}, "length": len(class_names), "_type": "List"}
    features = {
        "embedding": {"feature": {"dtype": "float32", "_type": "Value"}, "length": dim, "_type": "List"},
        "label": label,
    }
    return json.dumps({"info": {"features": features}})
