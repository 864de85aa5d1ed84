"""What the pages of a parquet file unpack to, added up from their headers before any page is unpacked.

The file's own footer may say anything: a reader allocates by what each page says of itself, up to 2 GB a page, and a
page of a few bytes can repeat one value two thousand million times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from common.errors import DataError

_HEADER_BYTES = 1 << 16  # of one page: the header holds two values of the column, which sets keep short
_DEEPEST = 8
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3


@dataclass
class Pages:
    """The pages of a column chunk: values and encodings of its data, bytes of all with headers, and of the largest."""

    values: int = 0
    size: int = 0
    largest: int = 0
    encodings: set[int | None] = field(default_factory=set)  # None: a dictionary, or a page of the second version


def check_pages(file: BinaryIO, metadata: Any, name: str, per_row: Mapping[str, int], most_bytes: int) -> None:
    """Refuse a parquet file whose pages hold other than its rows, or unpack to too much.

    Args:
        file: the open file.
        metadata: what pyarrow read of its footer.
        name: how messages name it.
        per_row: values that each row holds in each column, by the column's first name.
        most_bytes: bytes that one column of one row group may unpack to.

    Raises:
        DataError: a page can't be read, a column is none of these, holds more or fewer values, or is larger.
    """
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        for index in range(rows.num_columns):
            chunk = rows.column(index)
            if rows.num_rows == chunk.num_values == 0:
                continue  # no page is read
            column = chunk.path_in_schema.split(".", 1)[0]
            pages = pages_of(file, chunk, name)
            expected = rows.num_rows * per_row.get(column, 0)
            if not pages.values == chunk.num_values == expected:
                raise DataError(
                    f"{name}: column {column}: expected {expected:,} values, its pages hold {pages.values:,}"
                )
            if pages.size > most_bytes:
                raise DataError(
                    f"{name}: column {column} unpacks to {pages.size:,} bytes in one row group; expected at most "
                    f"{most_bytes:,} (it may be a decompression bomb): write it with smaller row groups"
                )


def pages_of(file: BinaryIO, chunk: Any, name: str) -> Pages:
    """What the headers of a column chunk's pages say; `name` is the file's in messages.

    Raises:
        DataError: a page can't be read.
    """
    try:
        return _add_up(file, chunk)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, OSError):
        column = chunk.path_in_schema.split(".", 1)[0]
        raise DataError(f"{name}: column {column}: its pages can't be read; the file is damaged") from None


def _add_up(file: BinaryIO, chunk: Any) -> Pages:
    place = int(chunk.data_page_offset)
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < place:
        place = int(chunk.dictionary_page_offset)
    end = place + int(chunk.total_compressed_size)
    pages = Pages()
    while place < end:
        file.seek(place)
        page, length = _struct(file.read(_HEADER_BYTES), 0, 0)
        kind, unpacked, packed = page[1], page[2], page[3]
        if min(unpacked, packed) < 0:
            raise ValueError("a page of negative size")
        if kind in {_DATA, _DATA_V2}:
            count = page[5 if kind == _DATA else 8][1]
            if count < 0:
                raise ValueError("a page with fewer values than none")
            pages.values += count
        elif kind != _DICTIONARY:
            raise ValueError("a page of another kind")
        pages.encodings.add(page[5][2] if kind == _DATA else None)
        pages.size += length + unpacked
        pages.largest = max(pages.largest, unpacked)
        place += length + packed
    if place != end:
        raise ValueError("a page that goes beyond its column")
    return pages


def _struct(content: bytes, place: int, depth: int) -> tuple[dict[int, Any], int]:
    """One Thrift struct in the compact encoding: its fields by number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := content[place]) != 0:
        place += 1
        kind = head & 0x0F
        if head >> 4:
            number += head >> 4
        else:
            number, place = _zigzag(content, place)
        fields[number], place = _value(content, place, kind, depth)
    return fields, place + 1


def _value(content: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    if kind in {1, 2}:
        return kind == 1, place
    if kind == 3:
        return content[place], place + 1
    if kind in {4, 5, 6}:
        return _zigzag(content, place)
    if kind == 7:
        return None, place + 8
    if kind == 8:
        length, place = _number(content, place)
        return None, place + length
    if kind in {9, 10}:
        return _list(content, place, depth)
    if kind == 12:
        return _struct(content, place, depth + 1)
    raise ValueError("a value of another kind")


def _list(content: bytes, place: int, depth: int) -> tuple[None, int]:
    head = content[place]
    place += 1
    count = head >> 4
    if count == 15:
        count, place = _number(content, place)
    for _ in range(count):
        if (head & 0x0F) in {1, 2}:
            place += 1
        else:
            _, place = _value(content, place, head & 0x0F, depth + 1)
        content[place - 1]  # the end of the content ends the loop, whatever the count says
    return None, place


def _number(content: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place
        if shift > 63:
            raise ValueError("a number too long")


def _zigzag(content: bytes, place: int) -> tuple[int, int]:
    number, place = _number(content, place)
    return (number >> 1) ^ -(number & 1), place
