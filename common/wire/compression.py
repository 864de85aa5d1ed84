"""Tensors in few bits: blocks of values as whole multiples of a step, packed into one array of bytes.

A tensor is cut into blocks of up to 2,048 values. Each block gets a scale, its largest magnitude over L = 2^(b-1) - 1,
and its values become codes -L .. L of b bits; value = code x scale. Tensors of at most 64 values (biases, counts,
single numbers) cost next to nothing and get 16 bits. The layout follows from the public shapes: the scales of all
blocks, then the codes.

*Up*, noised sums are rounded at random to one of the two codes around them: the decoded value is right in expectation,
so errors of sites and rounds average out. *Down*, values are rounded to the nearest code, and the error is made up for
in the next message (`common.wire.versions`).

Why this costs no privacy. All that is computed here, scales included, is a function of the values given and of public
random numbers. At a site the values are what is about to leave anyway: sums to which the noise was already added. A
function of a private release that reads no record is as private as the release (post-processing), whatever it is, and
even if the random numbers are known to everybody: so they come from the run's public seed, not from the noise source,
and protect nothing. A scale taken from values before the noise would tell their largest magnitude; nothing here sees
those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import WireError

Shapes = Mapping[str, tuple[int, ...]]
Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

OFF = 32  # bits of a float32: nothing is packed
BLOCK = 2048
_SMALL = 64
_SMALL_BITS = 16
_SCALE_BYTES = 4
_LARGEST = float(np.finfo(np.float32).max)


def packed_size(shapes: Shapes, bits: int) -> int:
    """Bytes of a packed message with every block in it."""
    lengths, widths = _blocks(shapes, bits)
    return _SCALE_BYTES * len(lengths) + _code_bytes(lengths, widths)


def pack(
    tensors: Mapping[str, Tensor], bits: int, draws: torch.Generator | None = None, *, leave_out_zeros: bool = False
) -> Tensor:
    """Tensors as one array of bytes.

    Args:
        tensors: finite values of any float type, by name. At a site: already noised.
        bits: b, width of a code, 4 to 16.
        draws: public random numbers for unbiased rounding; None rounds to the nearest code.
        leave_out_zeros: leave out the codes of blocks that are zero throughout; the size then depends on the values.

    Returns:
        (bytes,) uint8. Decoded, each value is off by less than one scale of its block (half of one to the nearest),
        and with `draws` right in expectation. Post-processing of `tensors`.

    Raises:
        WireError: a value is not finite; none is quoted.
    """
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    lengths, widths = _blocks(shapes, bits)
    parts = [tensors[name].detach().cpu().double().numpy().ravel() for name in _in_order(shapes)]
    values = np.concatenate(parts) if parts else np.zeros(0)
    if not np.isfinite(values).all():
        raise WireError("tensors to be packed have values that are not finite; nothing is sent")
    levels = _levels(widths)
    starts = np.cumsum(lengths) - lengths
    largest = np.maximum.reduceat(np.abs(values), starts) if len(lengths) else np.zeros(0)
    scales = _scales(largest, levels)
    each = np.repeat(scales.astype(np.float64), lengths)
    steps = np.divide(values, each, out=np.zeros_like(values), where=each > 0)
    if draws is None:
        codes = np.rint(steps)
    else:
        codes = np.floor(steps + torch.rand(values.size, dtype=torch.float64, generator=draws).numpy())
    most = np.repeat(levels, lengths)
    shifted = np.clip(codes, -most, most).astype(np.int64) + most
    content = scales.astype("<f4").tobytes()
    for width in np.unique(widths):
        blocks = (widths == width) & ((scales > 0) | (not leave_out_zeros))
        content += _pack_codes(shifted[np.repeat(blocks, lengths)], int(width))
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def unpack(packed: Tensor, shapes: Shapes, bits: int, *, zeros_left_out: bool = False) -> dict[str, Tensor]:
    """The inverse of `pack`, for an array that anybody may have made.

    Args:
        packed: (bytes,) uint8.
        shapes: name -> shape of what it must hold.
        bits: b.
        zeros_left_out: as it was packed.

    Returns:
        name -> float64 tensor.

    Raises:
        WireError: another type or length, a scale that is no number of at least 0, a code out of range, or bits set
            where there are none; no value is quoted.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise WireError("packed tensors must be one row of uint8; nothing of them is used")
    content = packed.cpu().numpy().tobytes()
    lengths, widths = _blocks(shapes, bits)
    head = _SCALE_BYTES * len(lengths)
    if len(content) < head:
        raise WireError(f"packed tensors: expected at least {head} bytes, found {len(content)}")
    with np.errstate(invalid="ignore"):  # a bit pattern that is no number is refused below
        scales = np.frombuffer(content[:head], dtype="<f4").astype(np.float64)
    if not np.isfinite(scales).all() or np.signbit(scales).any():
        raise WireError("packed tensors: a scale is not a finite number of at least 0; nothing of them is used")
    there = (scales > 0) | (not zeros_left_out)
    expected = head + _code_bytes(lengths[there], widths[there])
    if len(content) != expected:
        raise WireError(f"packed tensors: expected {expected} bytes, found {len(content)}; nothing of them is used")
    levels = _levels(widths)
    shifted: Codes = np.repeat(levels, lengths)  # what is left out is zero
    at = head
    for width in np.unique(widths):
        blocks = np.repeat((widths == width) & there, lengths)
        size = _bytes_of(int(blocks.sum()), int(width))
        shifted[blocks] = _unpack_codes(content[at : at + size], int(blocks.sum()), int(width))
        at += size
    most, each = np.repeat(levels, lengths), np.repeat(scales, lengths)
    codes = shifted - most
    if (codes > most).any() or codes[each == 0].any():
        raise WireError("packed tensors: a code is out of range; nothing of them is used")
    values = np.clip(codes * each, -_LARGEST, _LARGEST)
    tensors, at = {}, 0
    for name in _in_order(shapes):
        size = math.prod(shapes[name])
        tensors[name] = torch.from_numpy(values[at : at + size].copy()).reshape(shapes[name])
        at += size
    return {name: tensors[name] for name in shapes}


def _in_order(shapes: Shapes) -> list[str]:
    """One order of the tensors on both sides, whatever order they were built in."""
    return sorted(shapes)


def _blocks(shapes: Shapes, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Length and width of code of every block."""
    if not 4 <= bits <= 16:
        raise WireError(f"codes have 4 to 16 bits, found {bits}")
    lengths, widths = [], []
    for name in _in_order(shapes):
        size = math.prod(shapes[name])
        for start in range(0, size, BLOCK):
            lengths.append(min(BLOCK, size - start))
            widths.append(code_bits(size, bits))
    return np.array(lengths, dtype=np.int64), np.array(widths, dtype=np.int64)


def code_bits(size: int, bits: int) -> int:
    """Width of a code in a tensor of so many values."""
    return _SMALL_BITS if size <= _SMALL else bits


def _levels(widths: NDArray[np.int64]) -> Codes:
    """L: the largest code of each block; the code after the last one stands for nothing."""
    levels: Codes = 2 ** (widths - 1) - 1
    return levels


def _scales(largest: Floats, levels: Codes) -> NDArray[np.float32]:
    """Steps of the blocks, rounded up: the largest magnitude is within L of them."""
    wanted = largest / np.maximum(levels, 1)
    scales = wanted.astype(np.float32)
    return np.where(scales.astype(np.float64) < wanted, np.nextafter(scales, np.float32(np.inf)), scales)


def _code_bytes(lengths: NDArray[np.int64], widths: NDArray[np.int64]) -> int:
    return sum(_bytes_of(int(lengths[widths == width].sum()), int(width)) for width in np.unique(widths))


def _bytes_of(count: int, width: int) -> int:
    return (count * width + 7) // 8


def _pack_codes(codes: Codes, width: int) -> bytes:
    """Codes of `width` bits each, one after the other, highest bit first."""
    if width == 8:
        return codes.astype(np.uint8).tobytes()
    if width == 16:
        return codes.astype(">u2").tobytes()
    bits = np.unpackbits(codes.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 16 - width :]
    return np.packbits(bits).tobytes()


def _unpack_codes(content: bytes, count: int, width: int) -> Codes:
    if width == 8:
        return np.frombuffer(content, dtype=np.uint8).astype(np.int64)
    if width == 16:
        return np.frombuffer(content, dtype=">u2").astype(np.int64)
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8))
    if bits[count * width :].any():
        raise WireError("packed tensors: bits are set after the last code; nothing of them is used")
    wide = np.zeros((count, 16), dtype=np.uint8)
    wide[:, 16 - width :] = bits[: count * width].reshape(count, width)
    return np.packbits(wide, axis=1).view(">u2").ravel().astype(np.int64)
