"""Where the sample of a DICOM pixel lies in its cell, what values it can take, and how they become 8 bits.

Source: DICOM PS3.5 8.1.1 (cells), PS3.3 C.7.6.3.1.2 (photometric interpretations).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from embeddings.readers.codestream import Frame

_SAMPLES = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1, "RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3}
_IN_JPEG_2000 = {"YBR_ICT": 3, "YBR_RCT": 3}  # its decoder gives RGB
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114  # shares in the luminance


@dataclasses.dataclass(frozen=True)
class Samples:
    """The form of a file's samples.

    `bits` of each, the lowest of them `shift` places above the cell's lowest; `signed` in two's complement; `lossy`
    where the decoder may give values beyond the range; `floating` where pixels are floats and the rest says nothing.
    `narrow` where cells are said to be larger than a byte and the frame's decoder gives bytes.
    """

    bits: int
    shift: int = 0
    signed: bool = False
    lossy: bool = False
    floating: bool = False
    narrow: bool = False

    @property
    def low(self) -> int:
        """The smallest value that a sample can take."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest value that a sample can take."""
        return self.low + (1 << self.bits) - 1

    def of_cells(self, cells: NDArray[Any]) -> NDArray[Any]:
        """The values that lie in cells of the same type; the bits of a cell that are not the sample's say nothing."""
        spare = 8 * cells.dtype.itemsize - self.bits - self.shift
        if self.floating or spare < 0 or (spare == 0 and self.shift == 0):
            return cells
        if self.lossy:
            return np.clip(cells, self.low, self.high)
        return np.right_shift(np.left_shift(cells, spare), spare + self.shift)


def sample_form(
    dataset: Any, encoded: Frame | None, name: str, *, jpeg_2000: bool = False, lossy: bool = False
) -> Samples:
    """What the header, and the encoded frame where there is one, say of the samples.

    Args:
        dataset: the header of a file of whole numbers.
        encoded: what a JPEG, JPEG-LS or JPEG 2000 frame says of itself; None where frames are cells as they are.
        name: how messages name the file.
        jpeg_2000: the frame is JPEG 2000.
        lossy: the encoding may change values.

    Raises:
        DataError: the samples can't be placed.
    """
    colour, count = str(dataset.get("PhotometricInterpretation") or ""), int(dataset.get("SamplesPerPixel") or 1)
    known = {**_SAMPLES, **(_IN_JPEG_2000 if jpeg_2000 else {})}
    if known.get(colour) != count:
        raise DataError(
            f"{name}: pixels of {count} samples as {colour or 'nothing'}; expected one of {', '.join(_SAMPLES)}: "
            "store it as one of these"
        )
    allocated, bits = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    high = dataset.get("HighBit")
    shift = 0 if high is None else int(high) - bits + 1
    signed = int(dataset.get("PixelRepresentation") or 0)
    fits = 1 <= bits <= allocated and 0 <= shift <= allocated - bits and signed in (0, 1)
    if encoded is not None and encoded.bits <= bits:
        shift = 0  # the frame has nothing but the sample
        # a decoder of JPEG gives unsigned samples: which of their bits is the sign is known where they are full only
        fits &= encoded.signed is not None or not signed or encoded.bits == bits
        fits &= count == 1 or encoded.bits == bits
    elif encoded is not None:
        fits &= shift + bits <= encoded.bits
    if encoded is not None and count == 3:
        fits &= bool(signed) == bool(encoded.signed) and not (encoded.mixed and colour.startswith("YBR_FULL"))
    if not fits or (signed and colour.startswith("YBR")):
        depth = "" if encoded is None else f", in a frame of {encoded.bits} bits"
        raise DataError(
            f"{name}: samples of {bits} bits below bit {high} in {allocated}, sign {signed}{depth}, as {colour}: they "
            "can't be placed; correct the header or leave the file out"
        )
    narrow = encoded is not None and encoded.bits <= 8 < allocated
    return Samples(bits, shift, bool(signed), lossy and encoded is not None, narrow=narrow)


def as_stored(colour: str, bits: int, allocated: int) -> bool:
    """Whether colour is turned to RGB here and not by pydicom, which does so with 8 bits alone."""
    return colour.startswith("YBR_FULL") and (bits, allocated) != (8, 8)


def to_bytes(values: NDArray[Any], bits: int, low: int = 0) -> NDArray[np.uint8]:
    """Values of a fixed range in 8 bits: the upper byte of more bits, and fewer bits spread over all 256 values.

    Args:
        values: whole numbers from `low` to low + 2^bits - 1.
        bits: of each.
        low: the smallest.
    """
    if low:
        values = values.astype(np.int64) - low
    if bits < 8:
        return np.rint(values * (255.0 / ((1 << bits) - 1))).astype(np.uint8)
    if bits == 8 and values.dtype == np.uint8:
        return values
    return (values >> (bits - 8)).astype(np.uint8)


def to_rgb(values: NDArray[Any], bits: int) -> NDArray[np.int64]:
    """Luminance and colour differences, (h, w, 3), as red, green and blue of the same bits.

    Source: DICOM PS3.3 C.7.6.3.1.2, YBR_FULL; no colour lies at half of full scale.
    """
    light, half = values[..., 0].astype(np.float64), float(1 << bits - 1)
    blue, red = values[..., 1] - half, values[..., 2] - half
    red, blue = light + 2 * (1 - _RED) * red, light + 2 * (1 - _BLUE) * blue
    green = (light - _RED * red - _BLUE * blue) / _GREEN
    shown = np.floor(np.stack([red, green, blue], axis=-1) + 0.5)
    return np.clip(shown, 0, (1 << bits) - 1).astype(np.int64)
