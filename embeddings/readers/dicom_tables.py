"""Lookup tables of DICOM files: palettes, modality tables, tables of values of interest. One lookup for all of them.

Source: DICOM PS3.3 C.7.6.3.1.5-6 (palettes), C.7.9.2 (in segments), C.11.1.1 (modality), C.11.2.1.1 (of interest).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

_WORDS = np.dtype("<u2")


@dataclasses.dataclass(frozen=True)
class Table:
    """A lookup table: `first` is the input that meets `entries[0]`; entries take `bits` bits."""

    first: int
    entries: NDArray[np.uint16]
    bits: int

    def look_up(self, values: NDArray[Any]) -> NDArray[np.uint16]:
        """The entry of each value, whole or not; values beyond either end meet the entry there."""
        with np.errstate(invalid="ignore"):  # a float that is no number meets the first entry
            whole = values if values.dtype.kind in "iu" else np.rint(values)
            place = whole.astype(np.int64) - self.first
        return self.entries[np.clip(place, 0, len(self.entries) - 1)]


def read_table(item: Any, *, little: bool, signed: bool, name: str) -> Table:
    """The table of an item of a modality or VOI LUT sequence.

    Args:
        item: the item.
        little: byte order of the file.
        signed: whether inputs can be below zero: then the first input is signed, whatever its type says.
        name: how messages name the file.

    Raises:
        DataError: it is no table.
    """
    count, first, stated = _descriptor(item, "LUTDescriptor", little, signed, name)
    entries, width = _entries(_bytes(item, "LUTData", little, name), count, stated, name)
    return Table(first, entries, _depth(entries, stated, width))


def read_palette(dataset: Any, *, little: bool, signed: bool, name: str) -> tuple[Table, ...]:
    """The red, green and blue table of a palette, of the same bits.

    Raises:
        DataError: there is none.
    """
    tables: list[Table] = []
    stated = width = 0
    for colour in ("Red", "Green", "Blue"):
        count, first, stated = _descriptor(dataset, f"{colour}PaletteColorLookupTableDescriptor", little, signed, name)
        if f"{colour}PaletteColorLookupTableData" in dataset:
            data = _bytes(dataset, f"{colour}PaletteColorLookupTableData", little, name)
        else:
            raw = _bytes(dataset, f"Segmented{colour}PaletteColorLookupTableData", little, name)
            data = _expand(
                np.frombuffer(raw[: len(raw) & ~1], _WORDS) if stated > 8 else np.frombuffer(raw, np.uint8), count
            )
        entries, width = _entries(data, count, stated, name)
        tables.append(Table(first, entries, width))
    entries, width = np.concatenate([table.entries for table in tables]), max(table.bits for table in tables)
    depth = _depth(entries, stated, width, (8,))
    return tuple(dataclasses.replace(table, bits=depth) for table in tables)


def _descriptor(item: Any, keyword: str, little: bool, signed: bool, name: str) -> tuple[int, int, int]:
    """Number of entries, first input and bits of an entry. Types may be wrong (US or SS), so bits are looked at."""
    value = item.get(keyword)
    if isinstance(value, bytes):
        value = np.frombuffer(value[: len(value) & ~1], "<u2" if little else ">u2").tolist()
    if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 3:
        raise DataError(f"{name}: a lookup table without three numbers that describe it; leave the file out")
    count, first, bits = (int(number) & 0xFFFF for number in value)
    return count or 1 << 16, first - (1 << 16 if signed and first >= 1 << 15 else 0), bits


def _bytes(item: Any, keyword: str, little: bool, name: str) -> bytes:
    """A table's data as bytes, its words in little endian: then entries of one byte lie in their order as well."""
    if item.get(keyword) is None:
        raise DataError(f"{name}: a lookup table without data; leave the file out")
    element = item[keyword]
    if not isinstance(element.value, bytes):
        return (np.asarray(element.value, dtype=np.int64).reshape(-1) & 0xFFFF).astype(_WORDS).tobytes()
    if little or element.VR in {"OB", "UN"}:
        return element.value
    return np.frombuffer(element.value[: len(element.value) & ~1], ">u2").astype(_WORDS).tobytes()


def _entries(data: bytes, count: int, stated: int, name: str) -> tuple[NDArray[np.uint16], int]:
    """The entries, and the bits that each takes in the file: 8 where there are as many bytes as entries, else 16."""
    padded = count + count % 2
    if len(data) >= 2 * count and not (len(data) == padded and stated <= 8):
        return np.frombuffer(data, _WORDS, count).astype(np.uint16), 16
    if count <= len(data) <= padded:
        return np.frombuffer(data, np.uint8, count).astype(np.uint16), 8
    raise DataError(f"{name}: a lookup table of {len(data):,} bytes; expected {count:,} entries of one or two bytes")


def _depth(entries: NDArray[np.uint16], stated: int, width: int, depths: tuple[int, ...] = (8, 10, 12, 14)) -> int:
    """How many bits entries take: as the descriptor says, where that can be.

    It says 8 of some tables of 16 bits. It says 16 of some tables of fewer, which come out black by it: viewers look at
    the entries, and so does this, if they fill one of the `depths` that devices have.
    """
    needed = int(entries.max()).bit_length()
    stated = min(stated or width, width)
    if needed > stated:
        return 16 if stated <= 8 else needed
    if stated > 8:
        return next((depth for depth in depths if needed == depth < stated or needed < depth == 8), stated)
    return stated


def _expand(segments: NDArray[Any], count: int) -> bytes:
    """The entries of a palette in segments, at most `count` of them, as words or bytes like the segments.

    Raises:
        ValueError, IndexError: the segments are wrong.
    """
    entries: list[int] = []
    values, wide = segments.tolist(), segments.itemsize == 2

    def add(place: int) -> int:
        """Add what one segment stands for; returns the place of the next."""
        kind, length = values[place], values[place + 1]
        place += 2
        if length < 1:  # such segments could be copied without end
            raise ValueError("a segment of no entries")
        if kind == 0:
            entries.extend(values[place : place + length])
            return int(place + length)
        if kind == 1 and entries:
            line = np.linspace(entries[-1], values[place], length + 1)[1:]
            entries.extend(np.rint(line).astype(int).tolist())
            return place + 1
        raise ValueError("a segment of a kind that can't stand there")

    place = 0
    while len(entries) < count and place + 1 < len(values):
        if values[place] != 2:
            place = add(place)
            continue
        size = 2 if wide else 4
        parts = values[place + 2 : place + 2 + size]
        start = sum(part << (8 * segments.itemsize * number) for number, part in enumerate(parts)) // segments.itemsize
        for _ in range(values[place + 1]):
            start = add(start)
            if len(entries) >= count:
                break
        place += 2 + size
    return np.asarray(entries[:count], dtype=segments.dtype).tobytes()
