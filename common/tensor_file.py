"""A safetensors file's header looked at before it is parsed."""

from __future__ import annotations

from pathlib import Path

from common.errors import DataError

_LARGEST_HEADER = 10_000_000  # names, shapes and notes of a generator or classifier take some ten thousand bytes


def check_tensor_file(path: Path) -> None:
    """Refuse a safetensors file whose header is far larger than any of this project's.

    The library bounds it at 100 MB, which become gigabytes of objects.

    Raises:
        DataError: the header is too large, or the file can't be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}): fetch it again") from None
    if length > _LARGEST_HEADER:
        raise DataError(
            f"{path} can't be read: a header of {length:,} bytes, expected at most {_LARGEST_HEADER:,}: fetch it again"
        )
