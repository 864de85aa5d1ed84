"""How much a file may ask of this machine's memory and disk, whatever it says of itself. One place for the numbers.

A file of a megabyte can unpack to gigabytes. What a reader allocates is therefore bounded before it is allocated: by
absolute limits, which leave room for every picture and set that is in use, and beyond a free amount by how much larger
than the file a content may be. What goes beyond is refused like any damaged file: in one line, and the others go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Iterable, Iterator
from typing import IO

from common.errors import DataError

MIB = 1 << 20
MAX_PIXELS = 80_000_000  # of one picture: larger than any scanner's or camera's; a slide is cut into tiles
LARGE_PIXELS = 16_000_000  # larger pictures are decoded one at a time, else every core would hold one
FRAME_BYTES = 256 * MIB  # of one decoded frame: 80 million pixels of grey in 16 bits, or of colour in 8
INFLATED_BYTES = 512 * MIB  # of a deflated DICOM file: it can't be read but as a whole
FREE_BYTES = 64 * MIB  # what any file may unpack to
PICTURE_RATIO = 1000  # beyond that, decoded bytes for each byte of the file; blank pictures reach it, others 100
ARRAY_RATIO = 100  # the same for arrays and sets; embeddings reach 1.2, pictures of MedMNIST 10
DEFLATE_RATIO = 100  # the same for a deflated DICOM file as a whole
MAX_FRAMES = 100_000
MAX_PARTS = 300_000  # that a DICOM header is read in, two an attribute; each takes some hundred bytes
MAX_ITEMS = 60_000  # of a DICOM sequence that is looked at, those within it counted; each takes a kilobyte
MAX_SCANS = 1_000  # of a JPEG picture, each of which passes over all of it; progressive ones have some ten
MAX_TILES = 10_000  # of a JPEG 2000 picture, each of which takes some kilobytes
MAX_ROWS = 10_000_000  # of a set
MAX_DIMENSION = 65_536  # width of an embedding
ROW_GROUP_BYTES = 512 * MIB  # of one column in a row group of a set, the unit in which it is unpacked
MAX_TEXT = 1_000  # characters of a label, a patient's name or a cell of a set
LABEL_FILE_BYTES = 256 * MIB  # of a label file, which is held in memory
LABEL_ROWS = 2_000_000  # of the same; a row takes some hundred bytes

_one_large: contextlib.AbstractContextManager[object] = threading.Lock()


def check_size(name: str, width: int, height: int) -> None:
    """Refuse a picture that would fill the memory when decoded.

    Args:
        name: the file, for the message.
        width: pixels.
        height: pixels.

    Raises:
        DataError: no pixels, or more than `MAX_PIXELS`.
    """
    if width < 1 or height < 1:
        raise DataError(f"{name}: expected an image, found {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width}x{height} pixels; more than {MAX_PIXELS:,} pixels are refused (a small file with so many "
            "may be a decompression bomb); make the image smaller or leave it out"
        )


def check_scans(name: str, parts: Iterable[bytes]) -> None:
    """Refuse a JPEG stream, in parts, of so many scans that decoding it takes minutes.

    Raises:
        DataError: more than `MAX_SCANS`.
    """
    # the start of a scan can't stand within coded data, where a zero follows each byte of ones
    if sum(part.count(b"\xff\xda") for part in parts) > MAX_SCANS:
        raise DataError(f"{name}: more than {MAX_SCANS:,} scans of one picture; save it once more, or leave it out")


def check_unpacked(name: str, unpacked: int, packed: int, ratio: int) -> None:
    """Refuse content that is far larger than its file.

    Args:
        name: the file, for the message.
        unpacked: bytes that the content takes.
        packed: bytes of the file, or of its part.
        ratio: most bytes of content for each byte of the file, once the content takes more than `FREE_BYTES`.

    Raises:
        DataError: it is larger.
    """
    if unpacked > max(FREE_BYTES, ratio * packed):
        raise DataError(
            f"{name}: {packed:,} bytes that unpack to {unpacked:,}; expected at most {ratio} times as many (it may be "
            "a decompression bomb); leave it out, or store it with less compression"
        )


def check_frame(name: str, size: int, packed: int) -> None:
    """Refuse a frame of more decoded bytes than `FRAME_BYTES`, or than its encoded bytes make plausible.

    Raises:
        DataError: it is larger.
    """
    if size > FRAME_BYTES:
        raise DataError(f"{name}: a frame of {size:,} bytes; expected at most {FRAME_BYTES:,}: make it smaller")
    check_unpacked(name, size, packed, PICTURE_RATIO)


@contextlib.contextmanager
def decoding(pixels: int) -> Iterator[None]:
    """Hold back a large picture while another one is decoded, so that memory does not grow with the cores."""
    with _one_large if pixels > LARGE_PIXELS else contextlib.nullcontext():
        yield


class _FileLock:
    """A lock of a file that forks share; the system lifts that of a process that dies."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __enter__(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN)


def one_large_in_all(file: IO[bytes]) -> None:
    """From now on, `decoding` holds a large picture back while any fork of this process decodes one.

    Args:
        file: open for writing; it is locked meanwhile.
    """
    global _one_large
    _one_large = _FileLock(file)
