"""DICOM pixels as a viewer shows them, in 8 bits.

Stored values go through the modality transformation (rescale or table), then the window or table of values of
interest, to 0..255; MONOCHROME1 is inverted; colour comes out as RGB whatever its stored space; 16-bit colour
keeps its upper byte. A file without a window is shown from its smallest to its largest value, padding left
out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError

_BLOCK_PIXELS = 4_000_000  # shown at once: the arithmetic takes some 30 bytes a pixel


@dataclasses.dataclass(frozen=True)
class Window:
    """A window in place of the file's own: `center`, `width` (> 0) in modality units (CT: Hounsfield)."""

    center: float
    width: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.center) and np.isfinite(self.width) and self.width > 0):
            found = f"{self.center},{self.width}"
            raise ConfigError(f"window: expected CENTER,WIDTH with a width above 0; found {found}")


def render(dataset: Any, pixels: NDArray[Any], frame: int, window: Window | None) -> NDArray[np.uint8]:
    """Turn stored values into a picture, some rows at a time.

    Args:
        dataset: the pydicom data set they come from.
        pixels: (h, w) or (h, w, 3) stored values of one frame; colour already RGB.
        frame: number of the frame, for per-frame attributes.
        window: replaces the file's own.

    Returns:
        (h, w) or (h, w, 3) uint8.

    Source: DICOM PS3.3 C.7.6.3.1.2, C.11.1.1.2, C.11.2.1.2.
    """
    height = max(1, _BLOCK_PIXELS // pixels.shape[1])
    blocks = [pixels[top : top + height] for top in range(0, len(pixels), height)]
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        shown = [_upper_byte(apply_color_lut(block, dataset), 16) for block in blocks]
    elif pixels.ndim == 3:
        shown = [_upper_byte(block, int(dataset.BitsAllocated)) for block in blocks]
    else:
        function = None if window is None else _Function("LINEAR", window.center, window.width)
        if function is None and not dataset.get("VOILUTSequence"):
            function = _own_function(dataset, blocks, frame)
        shown = [_grey(dataset, block, frame, function) for block in blocks]
    return shown[0] if len(shown) == 1 else np.concatenate(shown)


@dataclasses.dataclass(frozen=True)
class _Function:
    """How values become 0..1: a DICOM function with its two numbers, or RANGE from `first` to `second`."""

    name: str
    first: float
    second: float

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values in modality units to 0..1, or beyond."""
        if self.name == "RANGE":
            low, high = self.first, self.second
            return (values - low) / (high - low) if high > low else np.zeros(values.shape)
        center, width = self.first, self.second
        if self.name == "SIGMOID":
            return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))
        if self.name == "LINEAR_EXACT":
            return (values - (center - width / 2.0)) / width
        return _linear(values, center, width)


def _grey(dataset: Any, pixels: NDArray[Any], frame: int, function: _Function | None) -> NDArray[np.uint8]:
    """Stored values in grey, by a function or, where there is none, by the file's own table."""
    values = _values(dataset, pixels, frame)
    if function is not None:
        shown = function.apply(values)
    else:
        from pydicom.pixels import apply_voi

        table = dataset.VOILUTSequence[0]
        shown = apply_voi(values.astype(np.int64), dataset, index=0) / (2.0 ** int(table.LUTDescriptor[2]) - 1.0)
    picture = np.rint(np.clip(shown, 0.0, 1.0) * 255.0).astype(np.uint8)
    return 255 - picture if dataset.PhotometricInterpretation == "MONOCHROME1" else picture


def _values(dataset: Any, pixels: NDArray[Any], frame: int) -> NDArray[Any]:
    """Stored values in modality units (CT: Hounsfield)."""
    if "ModalityLUTSequence" in dataset:
        from pydicom.pixels import apply_modality_lut

        return np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64)
    slope = _attribute(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
    intercept = _attribute(dataset, frame, "PixelValueTransformationSequence", "RescaleIntercept")
    slope = 1.0 if slope is None else float(slope)
    values: NDArray[Any] = pixels * slope + (0.0 if intercept is None else float(intercept))
    return values


def _own_function(dataset: Any, blocks: list[NDArray[Any]], frame: int) -> _Function:
    """The file's window, or its whole range where it has none."""
    center = _first(_attribute(dataset, frame, "FrameVOILUTSequence", "WindowCenter"))
    width = _first(_attribute(dataset, frame, "FrameVOILUTSequence", "WindowWidth"))
    if center is not None and width is not None and width > 0:
        name = _attribute(dataset, frame, "FrameVOILUTSequence", "VOILUTFunction") or "LINEAR"
        return _Function(str(name), center, width)
    padding = dataset.get("PixelPaddingValue")
    ends: list[float] = []
    for block in blocks:
        values = _values(dataset, block, frame)
        inside = values[np.isfinite(values) & (True if padding is None else block != padding)]
        ends += [float(inside.min()), float(inside.max())] if inside.size else []
    return _Function("RANGE", min(ends, default=0.0), max(ends, default=0.0))


def _linear(values: NDArray[Any], center: float, width: float) -> NDArray[Any]:
    """The default function: the window's ends count as in PS3.3 C.11.2.1.2.1, with its halves and ones."""
    if width <= 1.0:
        return (values > center - 0.5).astype(np.float64)
    return (values - (center - 0.5)) / (width - 1.0) + 0.5


def _attribute(dataset: Any, frame: int, group: str, keyword: str) -> Any:
    """Look an attribute up at the frame, then in the groups all frames share, then at the top."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
    shared = dataset.get("SharedFunctionalGroupsSequence")
    for groups, index in ((per_frame, frame), (shared, 0)):
        if groups and index < len(groups) and groups[index].get(group):
            value = groups[index].get(group)[0].get(keyword)
            if value is not None:
                return value
    return dataset.get(keyword)


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    several = hasattr(value, "__len__") and not isinstance(value, str)
    if several and len(value) == 0:
        return None
    return float(value[0] if several else value)


def _upper_byte(pixels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    return (pixels >> (bits - 8)).astype(np.uint8)
