"""Archives and parquet files unpacked within bounds: sizes are looked at before anything is allocated or written."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common.durable import whole_file
from common.errors import DataError
from common.parquet_pages import check_pages
from embeddings.limits import (
    ARRAY_RATIO,
    MAX_DIMENSION,
    MAX_ROWS,
    MAX_TEXT,
    MIB,
    ROW_GROUP_BYTES,
    check_unpacked,
)


def unpack(path: Path, name: str, work: Path) -> NDArray[Any]:
    """Unpack one array of an archive to a folder and map it.

    Args:
        path: the `.npz`.
        name: the array.
        work: the folder; an array unpacked there before is used again.

    Returns:
        The array, mapped read-only (an empty array is read as it is).

    Raises:
        DataError: there is no such array, it is damaged or holds objects, or the disk is full.
    """
    target = work / f"{path.stem}-{name}.npy"
    try:
        if not target.is_file():
            with zipfile.ZipFile(path) as archive:
                entry = archive.getinfo(f"{name}.npy")
                if archive.namelist().count(entry.filename) > 1:
                    raise DataError(f"{path}: the array {name} comes twice: store it once")
                if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                    raise DataError(
                        f"{path}: the array {name} is packed in a way that numpy does not use: pack it again"
                    )
                with archive.open(entry) as source, whole_file(target) as file:
                    _copy(source, file, entry.compress_size, f"{path}: the array {name}")
        return np.asarray(np.load(target, mmap_mode="r", allow_pickle=False))
    except DataError:
        raise
    except KeyError:
        raise DataError(f"{path}: expected an array called {name}, found none") from None
    except OSError as error:
        raise DataError(f"{path}: can't unpack {name} into {work} ({error.strerror or error})") from None
    except Exception as error:  # a damaged or crafted archive may raise anything
        raise DataError(f"{path}: the array {name} is damaged ({type(error).__name__})") from None


def _copy(source: IO[bytes], file: IO[bytes], packed: int, name: str) -> None:
    """Unpack an array whose header says how large it is, and no byte more.

    Raises:
        DataError: it holds objects, texts or rows beyond the limits, is far larger than what is packed, or its size is
            not what its header says.
        ValueError: the header is none.
    """
    # later versions are for records, and read a header as long as it says of itself before they look at its length
    if np.lib.format.read_magic(source) != (1, 0):
        raise DataError(f"{name}: expected numpy's format 1.0, in which numbers and texts are stored: store it again")
    shape, fortran, kind = np.lib.format.read_array_header_1_0(source)
    if kind.hasobject or kind.names is not None:
        raise DataError(f"{name} is damaged: expected numbers or texts, found objects or records")
    if (kind.kind in "US" and kind.itemsize > 4 * MAX_TEXT) or kind.kind == "V":
        raise DataError(
            f"{name}: expected texts of at most {MAX_TEXT} characters, found items of {kind.itemsize} bytes"
        )
    if max(shape, default=0) > MAX_ROWS or min(shape, default=0) < 0:
        raise DataError(f"{name}: expected at most {MAX_ROWS:,} rows, found the shape {shape}")
    size = math.prod(shape) * kind.itemsize
    check_unpacked(name, size, packed, ARRAY_RATIO)
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    left = size
    while left and (piece := source.read(min(left, MIB))):
        file.write(piece)
        left -= len(piece)
    if left or source.read(1):
        raise DataError(f"{name} is damaged: expected {size:,} bytes, as its header says, found another number")


def check_sizes(path: Path, file: Any) -> None:
    """Refuse a store that would unpack to more than a set can have, or to far more than the file's size.

    Raises:
        DataError: it has other columns than a store, too many rows or values, or pages that say so of themselves.
    """
    schema, rows = file.schema_arrow, file.metadata.num_rows
    kind, label = schema.field("embedding").type, schema.field("label").type
    findings = pa.types.is_fixed_size_list(label) and label.value_type == pa.int8()
    widths = {"embedding": kind.list_size, "label": label.list_size if findings else 1}
    per_row = {}
    for field in schema:
        text = pa.types.is_dictionary(field.type) and field.type.value_type == pa.string()
        held = {"embedding": kind, "key": pa.binary(16), "label": label if findings else pa.int64()}
        held["patient"] = pa.int64()
        if not text and field.type != held.get(field.name):
            raise DataError(f"{path}: column {field.name}: expected what a store holds, found {field.type}")
        per_row[field.name] = widths.get(field.name, 1)
    if rows > MAX_ROWS or not all(1 <= width <= MAX_DIMENSION for width in widths.values()):
        raise DataError(
            f"{path}: expected at most {MAX_ROWS:,} rows of width 1 to {MAX_DIMENSION:,}, found {rows:,} of "
            f"{kind.list_size:,} values and {widths['label']:,} labels"
        )
    size = path.stat().st_size
    unpacked = rows * (kind.list_size * np.dtype(np.float32).itemsize + widths["label"])
    check_unpacked(str(path), unpacked, size, ARRAY_RATIO)
    with path.open("rb") as raw:
        check_pages(raw, file.metadata, str(path), per_row, ROW_GROUP_BYTES)


def read_texts(path: Path, column: Any, *, whole: bool = True) -> NDArray[np.str_]:
    """A text column of a store, read as a dictionary.

    The array is as wide as the longest text, which is looked at first.

    Args:
        path: the store, for messages.
        column: the column.
        whole: refuse a text of more than `MAX_TEXT` characters; else it is cut.

    Raises:
        DataError: a text is too long, or the array far larger than the file; only if `whole`.
    """
    known = [chunk.dictionary.to_pylist() for chunk in column.chunks]
    longest = max((len(text or "") for texts in known for text in texts), default=0)
    if whole and longest > MAX_TEXT:
        raise DataError(f"{path}: expected texts of at most {MAX_TEXT:,} characters, found one of {longest:,}")
    if whole:
        size = len(column) * longest * np.dtype("U1").itemsize
        check_unpacked(str(path), size, path.stat().st_size, ARRAY_RATIO)
    parts = [
        np.asarray([(text or "")[:MAX_TEXT] for text in texts], dtype=np.str_)[np.from_dlpack(chunk.indices)]
        for texts, chunk in zip(known, column.chunks, strict=True)
        if len(chunk)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.str_)
