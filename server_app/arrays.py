"""Tensors of a reply from the bytes that arrived: nothing is allocated by what those bytes claim."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from common.errors import WireError
from common.wire.allow_list import Kind, check_names, dtype_of

_STYPE = "numpy.ndarray"
_MAGIC = b"\x93NUMPY\x01\x00"
_DESCRIPTIONS = {torch.float32: "<f4", torch.uint8: "|u1"}


def read_tensors(kind: Kind, record: ArrayRecord, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a reply.

    Name, type, shape and number of bytes are held against what is expected before a value is looked at. numpy's own
    reader is not used: it parses a header that the sender wrote, and allocates what that header says.

    Args:
        kind: of the message.
        record: as it arrived.
        shapes: name -> shape of all that must be there.

    Returns:
        Finite tensors by name.

    Raises:
        WireError: names the first tensor that is not what is expected; no value is quoted.
    """
    check_names(kind, record, shapes)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = _tensor(f"message {kind}: tensor {name!r}", record[name], dtype_of(kind), tuple(shape))
    return tensors


def _tensor(what: str, array: Array, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    wanted, description = str(dtype).removeprefix("torch."), _DESCRIPTIONS[dtype]
    if array.stype != _STYPE or array.dtype != wanted or tuple(array.shape) != shape:
        found = f"{array.dtype[:20]!r} of shape {str(tuple(array.shape))[:60]}"
        raise WireError(f"{what} must be {wanted} of shape {shape}, found {found}")
    start, size = _start_of_values(array.data, description, shape), math.prod(shape)
    if start is None or len(array.data) - start != size * np.dtype(description).itemsize:
        raise WireError(f"{what} must hold {size} values of {wanted} in numpy's format: its bytes are others")
    values = np.frombuffer(array.data, dtype=description, count=size, offset=start)
    tensor = torch.from_numpy(values.reshape(shape).copy())
    if not bool(torch.isfinite(tensor).all()):
        raise WireError(f"{what} has values that are not finite")
    return tensor


def _start_of_values(data: bytes, description: str, shape: tuple[int, ...]) -> int | None:
    """Where the values begin, if the header is the one that numpy writes for this type and shape; else None."""
    if len(data) < len(_MAGIC) + 2 or not data.startswith(_MAGIC):
        return None
    begin = len(_MAGIC) + 2
    end = begin + int.from_bytes(data[begin - 2 : begin], "little")
    header = {"descr": description, "fortran_order": False, "shape": shape}
    expected = "{" + "".join(f"{key!r}: {value!r}, " for key, value in header.items()) + "}"
    return end if data[begin:end].rstrip() == expected.encode() else None
