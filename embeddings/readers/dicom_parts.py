"""How many parts a DICOM header may have, and how long values may be that are looked at.

A part of eight bytes becomes an object of some hundred: neither the size of a file nor what it unpacks to bounds the
memory that its header takes. So reads are counted, and values that become lists when looked at have a length.
"""

from __future__ import annotations

from typing import Any, BinaryIO

from common.errors import DataError
from embeddings.limits import MAX_ITEMS, MAX_PARTS, MIB

# Groups of the attributes that are looked at: text, patient, series, picture, functional groups. Others stay bytes.
_LONGEST = {0x0010: MIB // 16, 0x0020: MIB // 16, 0x0028: MIB // 2, 0x5200: 4 * MIB}
_CHARACTER_SET = 0x00080005
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # what begins an item, in either order of bytes


class InParts:
    """An open file that is read in so many parts at most.

    Args:
        file: the open file.
        name: how messages name it.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self._left = file, name, MAX_PARTS

    def read(self, size: int = -1) -> bytes:
        """As of a file. Raises DataError where too many parts were read."""
        self._left -= 1
        if self._left < 0:
            raise DataError(f"{self._name}: a DICOM header of more than {MAX_PARTS:,} parts; leave it out")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def check_values(dataset: Any, name: str) -> None:
    """Refuse a header in which a value that is looked at is longer than any device writes.

    Args:
        dataset: a pydicom data set as it was read; values that were not looked at yet are bytes, and stay so.
        name: how messages name the file.

    Raises:
        DataError: a value is too long.
    """
    for tag in list(dataset.keys()):
        most = MIB // 16 if tag == _CHARACTER_SET else _LONGEST.get(tag.group)
        element = dataset.get_item(tag)
        if most is None or element.value is None:
            continue
        if not element.is_raw and element.VR == "SQ":  # its length was left open, so its parts were counted
            for item in element.value:
                check_values(item, name)
        elif isinstance(element.value, bytes) and len(element.value) > most:
            raise DataError(f"{name}: a DICOM attribute of {len(element.value):,} bytes; expected at most {most:,}")
        elif isinstance(element.value, bytes) and max(map(element.value.count, _ITEMS)) > MAX_ITEMS:
            raise DataError(f"{name}: a DICOM sequence of more than {MAX_ITEMS:,} items; leave it out")
