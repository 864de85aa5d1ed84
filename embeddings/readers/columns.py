"""Arrays of an `.npz`, and columns of a parquet file as such arrays: sizes are looked at before anything is read."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.durable import whole_file
from common.errors import DataError
from common.parquet_pages import pages_of
from embeddings.bounded import read_texts, unpack
from embeddings.limits import ARRAY_RATIO, MAX_DIMENSION, MAX_ROWS, ROW_GROUP_BYTES, check_unpacked

_BATCH = 4096
_VALUE_BYTES = 8  # of the widest number


@dataclass(frozen=True)
class Archive:
    """The arrays of an `.npz`, unpacked to a working folder and mapped from there."""

    path: Path
    work: Path

    def has(self, name: str) -> bool:
        """Whether there is an array of this name."""
        with zipfile.ZipFile(self.path) as archive:
            return f"{name}.npy" in archive.namelist()

    def read(self, name: str) -> NDArray[Any]:
        """One array; raises `DataError` as `unpack` does."""
        return unpack(self.path, name, self.work)


@dataclass(frozen=True)
class Columns:
    """The columns of a parquet file: numbers and texts (n,), lists of numbers (n, width).

    An empty cell is NaN among floats, -1 among whole numbers and an empty text among texts.
    """

    path: Path
    work: Path

    def read(self, name: str) -> NDArray[Any]:
        """One column; a list's numbers are written to the working folder and mapped from there.

        Raises:
            DataError: there is no such column, it holds something else, lists differ in length, or the file is damaged
                or unpacks to far more than its size.
        """
        names = self._schema().names
        if names.count(name) != 1:
            raise DataError(f"{self.path}: expected one column called {name}; found {', '.join(names)}")
        kind = self._schema().field(name).type
        try:
            with pq.ParquetFile(self.path, read_dictionary=[name] if _is_text(kind) else None) as file:
                self._check(name, file.metadata)
                if _is_text(kind):
                    return read_texts(self.path, _without_gaps(file.read([name]).column(name)))
                if _is_number(kind):
                    parts = [_numbers(batch.column(0)) for batch in file.iter_batches(_BATCH, columns=[name])]
                    return np.concatenate(parts) if parts else np.zeros(0)
                if _is_list(kind) and _is_number(kind.value_type):
                    return self._matrix(name, file)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(f"{self.path}: the column {name} can't be read ({type(error).__name__})") from None
        raise DataError(f"{self.path}: expected the column {name} as numbers, texts or lists of numbers, found {kind}")

    def _schema(self) -> Any:
        try:
            return pq.read_schema(self.path)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(
                f"{self.path}: expected a parquet file; it can't be read ({type(error).__name__})"
            ) from None

    def _check(self, name: str, metadata: Any) -> None:
        """Refuse a column whose pages say that they unpack to too much."""
        if metadata.num_rows > MAX_ROWS:
            raise DataError(f"{self.path}: expected at most {MAX_ROWS:,} rows, found {metadata.num_rows:,}")
        size = 0
        with self.path.open("rb") as raw:
            for group, index in np.ndindex(metadata.num_row_groups, metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                if chunk.path_in_schema != name and not chunk.path_in_schema.startswith(f"{name}."):
                    continue
                pages = pages_of(raw, chunk, str(self.path))
                held = max(pages.size, _VALUE_BYTES * pages.values)
                if held > ROW_GROUP_BYTES:
                    raise DataError(
                        f"{self.path}: column {name} unpacks to {held:,} bytes in one row group; expected at most "
                        f"{ROW_GROUP_BYTES:,}: write it with smaller row groups"
                    )
                size += held
        check_unpacked(str(self.path), size, self.path.stat().st_size, ARRAY_RATIO)

    def _matrix(self, name: str, file: Any) -> NDArray[Any]:
        target = self.work / f"{self.path.stem}-{file.schema_arrow.get_field_index(name)}.npy"
        if not target.is_file():
            width = self._width(name, file)
            shape = (file.metadata.num_rows, width)
            with whole_file(target) as out:
                for number, batch in enumerate(file.iter_batches(_BATCH, columns=[name])):
                    block = self._block(name, batch.column(0), width)
                    if number == 0:
                        header = {"descr": block.dtype.str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(out, header)
                    out.write(block.tobytes())
        return np.asarray(np.load(target, mmap_mode="r", allow_pickle=False))

    def _width(self, name: str, file: Any) -> int:
        """Numbers of the first list; all have to have as many."""
        for batch in file.iter_batches(_BATCH, columns=[name]):
            known = batch.column(0).drop_null()
            if len(known):
                width = len(known[0])
                if not 0 < width <= MAX_DIMENSION:
                    raise DataError(
                        f"{self.path}: column {name}: expected lists of 1 to {MAX_DIMENSION:,} numbers, found {width:,}"
                    )
                return width
        raise DataError(f"{self.path}: the column {name} holds no list")

    def _block(self, name: str, lists: Any, width: int) -> NDArray[Any]:
        known = lists.drop_null()
        values = _numbers(known.flatten())
        lengths = width if pa.types.is_fixed_size_list(known.type) else np.asarray(known.value_lengths())
        if np.any(lengths != width):
            raise DataError(f"{self.path}: expected lists of {width} numbers in the column {name}, found others")
        block = np.full((len(lists), width), np.nan if values.dtype.kind == "f" else -1, dtype=values.dtype)
        block[np.asarray(lists.is_valid())] = values.reshape(-1, width)
        return block


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _numbers(values: Any) -> NDArray[Any]:
    if pa.types.is_floating(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False))  # an empty one is NaN
    return np.asarray(values.cast(pa.int64()).fill_null(-1).to_numpy())


def _without_gaps(column: Any) -> Any:
    """A column of texts, read as a dictionary, with empty texts for empty cells."""
    parts = []
    for chunk in column.chunks:
        texts = pa.concat_arrays([chunk.dictionary, pa.array([""], chunk.dictionary.type)])
        parts.append(pa.DictionaryArray.from_arrays(chunk.indices.fill_null(len(chunk.dictionary)), texts))
    return pa.chunked_array(parts, column.type)
