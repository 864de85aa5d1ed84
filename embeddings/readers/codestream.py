"""What an encoded frame says of its own size, before a decoder allocates it.

A decoder believes the frame, not the file around it: a frame of a hundred bytes may declare itself larger than any
memory. Frames whose own size differs from the file's are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from common.errors import DataError
from embeddings.limits import MAX_TILES, check_scans

_JPEG_STANDALONE = {0x01, *range(0xD0, 0xD9)}
_JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_JPEG_HIERARCHY, _JPEG_SCAN, _JPEG_END = 0xDE, 0xDA, 0xD9


class Frame(NamedTuple):
    """What a frame declares: its size, the bits of a sample, and whether samples are signed (None: it can't say).

    `mixed` where JPEG 2000 mixes the colours and its decoder gives red, green and blue.
    """

    columns: int
    rows: int
    samples: int
    bits: int
    signed: bool | None
    mixed: bool = False


def frame_size(frame: bytes, name: str) -> Frame:
    """What a JPEG, JPEG-LS or JPEG 2000 frame declares.

    Raises:
        DataError: the frame declares no size, or several, or is cut into too many tiles or scans.
    """
    jpeg = frame.startswith(b"\xff\xd8")
    if jpeg:
        check_scans(name, (frame,))
    try:
        found = _jpeg(frame) if jpeg else _jpeg_2000(frame, name)
    except (struct.error, IndexError, ValueError):
        found = None
    if found is None:
        raise DataError(f"{name}: an encoded frame that does not say its size; copy the file again or leave it out")
    return found


def rle_size(frame: bytes) -> int:
    """Bytes to which a DICOM RLE frame unpacks, all of its segments together; counted, not unpacked."""
    offsets = [*struct.unpack_from("<16I", frame)[1:], len(frame)]
    count = min(struct.unpack_from("<I", frame)[0], 15)
    ends = [*offsets[1:count], len(frame)]
    total = 0
    for start, end in zip(offsets[:count], ends, strict=True):
        place = start
        while place < min(end, len(frame)):
            head = frame[place]
            total += head + 1 if head < 128 else 257 - head if head > 128 else 0
            place += head + 2 if head < 128 else 2 if head > 128 else 1
    return total


def _jpeg(frame: bytes) -> Frame | None:
    """The one frame header before the first scan; none where there are several, or a hierarchy of them."""
    found: set[Frame] = set()
    for kind, place in _segments(frame):
        if kind == _JPEG_HIERARCHY:
            return None
        if kind in _JPEG_FRAMES:
            bits, rows, columns, samples = struct.unpack_from(">BHHB", frame, place + 2)
            found.add(Frame(columns, rows, samples, bits, None))
    return found.pop() if len(found) == 1 else None


def _segments(frame: bytes) -> Iterator[tuple[int, int]]:
    """Kind and place (of its length) of each segment of a JPEG stream up to its first scan."""
    place = 2
    while True:
        if frame[place] != 0xFF:
            raise IndexError("no marker where one must be")
        while frame[place] == 0xFF:
            place += 1
        kind = frame[place]
        place += 1
        if kind in {_JPEG_SCAN, _JPEG_END}:
            return
        if kind in _JPEG_STANDALONE:
            continue
        yield kind, place
        place += struct.unpack_from(">H", frame, place)[0]


def _jpeg_2000(frame: bytes, name: str) -> Frame | None:
    """The size of a codestream, raw or in the boxes of a JP2 file."""
    place = 0
    while frame[place : place + 2] != b"\xff\x4f":
        length, kind = struct.unpack_from(">I4s", frame, place)
        head = 8
        if length == 1:
            length, head = struct.unpack_from(">Q", frame, place + 8)[0], 16
        if kind != b"jp2c" and length < 8:
            return None
        place += head if kind == b"jp2c" else length
    if frame[place + 2 : place + 4] != b"\xff\x51":
        return None
    x, y, left, top, tile_x, tile_y, tile_left, tile_top, samples = struct.unpack_from(">8IH", frame, place + 8)
    if not (x > left and y > top and tile_x and tile_y and tile_left <= left and tile_top <= top):
        return None
    tiles = -(-(x - tile_left) // tile_x) * -(-(y - tile_top) // tile_y)
    if tiles > MAX_TILES:
        raise DataError(f"{name}: a JPEG 2000 frame of {tiles:,} tiles; expected at most {MAX_TILES:,}: leave it out")
    forms = set(frame[place + 42 : place + 42 + 3 * samples : 3])
    if len(forms) != 1:
        return None
    form = forms.pop()
    style = frame.index(b"\xff\x52", place)  # COD: two bytes of length, style, order, two of layers, and the mixing
    return Frame(x - left, y - top, samples, (form & 0x7F) + 1, bool(form & 0x80), frame[style + 8] == 1)
