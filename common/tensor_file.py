"""A safetensors file read within bounds."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import DataError

_LARGEST_HEADER = 10_000_000  # names, shapes and notes of a generator or classifier take some ten thousand bytes


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, its header looked at before it is parsed.

    The library bounds a header at 100 MB, which become gigabytes of objects.

    Raises:
        DataError: the header is far larger than any of this project's, or the file can't be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER:
            what = f"a header of {length:,} bytes, expected at most {_LARGEST_HEADER:,}"
            raise DataError(f"{path} can't be read: {what}: fetch it again")
        with safe_open(path, framework="pt") as content:
            names = content.keys()
            return content.metadata() or {}, {name: content.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path} can't be read ({type(error).__name__}): fetch it again") from None
