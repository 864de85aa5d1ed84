"""DICOM pixels as a viewer shows them, in 8 bits.

Stored values go through the modality transformation (rescale or table), then the window or table of values of
interest, to 0..255; MONOCHROME1 is inverted; colour comes out as RGB whatever its stored space; colour of more than 8
bits keeps its upper byte. A file without a window is shown from its smallest to its largest value, padding left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, DataError
from embeddings.readers.dicom_samples import Samples, as_stored, to_bytes, to_rgb
from embeddings.readers.dicom_tables import Table, read_palette, read_table

_BLOCK_SAMPLES = 4_000_000  # shown at once: the arithmetic takes some 30 bytes a sample
_PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")
_FLOAT_PADDING = ("FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit")
_DOUBLE_PADDING = ("DoubleFloatPixelPaddingValue", "DoubleFloatPixelPaddingRangeLimit")


@dataclasses.dataclass(frozen=True)
class Window:
    """A window in place of the file's own: `center`, `width` (> 0) in modality units (CT: Hounsfield)."""

    center: float
    width: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.center) and np.isfinite(self.width) and self.width > 0):
            found = f"{self.center},{self.width}"
            raise ConfigError(f"window: expected CENTER,WIDTH with a width above 0; found {found}")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where pixels come from: the data set, the number of the frame, the samples' form, and the file's name."""

    dataset: Any
    frame: int
    samples: Samples
    name: str

    @property
    def little(self) -> bool:
        """Byte order of the file."""
        return bool(self.dataset.file_meta.TransferSyntaxUID.is_little_endian)

    def groups(self) -> Iterator[Any]:
        """The functional groups of the frame, then those that all frames share."""
        per_frame = self.dataset.get("PerFrameFunctionalGroupsSequence")
        shared = self.dataset.get("SharedFunctionalGroupsSequence")
        for groups, index in ((per_frame, self.frame), (shared, 0)):
            if groups and index < len(groups):
                yield groups[index]

    def places(self, group: str) -> Iterator[Any]:
        """Where an attribute may stand: in this group of the frame, in that of all frames, at the top."""
        yield from (groups.get(group)[0] for groups in self.groups() if groups.get(group))
        yield self.dataset

    def number(self, group: str, keyword: str, default: float) -> float:
        """A number, from the first place that has one. Raises DataError where it is none, or not finite."""
        for place in self.places(group):
            value = place.get(keyword)
            if value is not None and value != "":
                found = _number(value)
                if found is None:
                    raise DataError(f"{self.name}: expected a finite number as {keyword}; correct the header")
                return found
        return default


def render(source: Source, pixels: NDArray[Any], window: Window | None) -> NDArray[np.uint8]:
    """Turn stored values into a picture, some rows at a time.

    Args:
        source: where they come from.
        pixels: (h, w) or (h, w, 3) cells of one frame; colour in RGB, or `as_stored`.
        window: replaces the file's own.

    Returns:
        (h, w) or (h, w, 3) uint8.

    Raises:
        DataError: a table, rescale or window of the file can't be used.

    Source: DICOM PS3.3 C.7.6.3.1.2, C.11.1.1.2, C.11.2.1.2.
    """
    samples, colour = source.samples, str(source.dataset.get("PhotometricInterpretation") or "")
    height = max(1, _BLOCK_SAMPLES // pixels[0].size)
    blocks = [pixels[top : top + height] for top in range(0, len(pixels), height)]
    if colour == "PALETTE COLOR":
        palette = read_palette(source.dataset, little=source.little, signed=samples.signed, name=source.name)
        shown = [
            np.stack([to_bytes(table.look_up(samples.of_cells(block)), table.bits) for table in palette], axis=-1)
            for block in blocks
        ]
    elif pixels.ndim == 3:
        shown = [_colour(samples, block, colour) for block in blocks]
    else:
        modality = _modality(source)
        shown_as = _Function("LINEAR", window.center, window.width) if window else _own(source, modality, blocks)
        shown = [_grey(samples, modality, shown_as, block, colour == "MONOCHROME1") for block in blocks]
    return shown[0] if len(shown) == 1 else np.concatenate(shown)


@dataclasses.dataclass(frozen=True)
class _Rescale:
    """Stored values to modality units (CT: Hounsfield) by a line."""

    slope: float
    intercept: float

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(values * self.slope + self.intercept)

    def signed(self, samples: Samples) -> bool:
        """Whether a result can be below zero."""
        return min(samples.low * self.slope, samples.high * self.slope) + self.intercept < 0


@dataclasses.dataclass(frozen=True)
class _ByTable:
    """Values to others by a table; `whole` scales its entries to 0..1."""

    table: Table
    whole: bool = False

    def apply(self, values: NDArray[Any]) -> NDArray[Any]:
        found = self.table.look_up(values).astype(np.float64)
        return found / (2.0**self.table.bits - 1.0) if self.whole else found

    def signed(self, samples: Samples) -> bool:
        return False


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


def _colour(samples: Samples, cells: NDArray[Any], colour: str) -> NDArray[np.uint8]:
    values = samples.of_cells(cells)
    if as_stored(colour, samples.bits, 8 * cells.dtype.itemsize):
        values = to_rgb(values, samples.bits)
    return to_bytes(values, samples.bits, samples.low)


def _grey(
    samples: Samples, modality: _Rescale | _ByTable, shown_as: _Function | _ByTable, cells: NDArray[Any], inverted: bool
) -> NDArray[np.uint8]:
    shown = shown_as.apply(modality.apply(samples.of_cells(cells)))
    picture = np.rint(np.nan_to_num(np.clip(shown, 0.0, 1.0), copy=False) * 255.0).astype(np.uint8)
    return 255 - picture if inverted else picture


def _modality(source: Source) -> _Rescale | _ByTable:
    """How stored values become modality units."""
    tables = source.dataset.get("ModalityLUTSequence")
    if tables:
        signed = source.samples.signed
        return _ByTable(read_table(tables[0], little=source.little, signed=signed, name=source.name))
    slope = source.number("PixelValueTransformationSequence", "RescaleSlope", 1.0)
    intercept = source.number("PixelValueTransformationSequence", "RescaleIntercept", 0.0)
    if slope == 0:
        raise DataError(f"{source.name}: a rescale slope of 0, by which all values are the same; correct the header")
    return _Rescale(slope, intercept)


def _own(source: Source, modality: _Rescale | _ByTable, blocks: list[NDArray[Any]]) -> _Function | _ByTable:
    """The file's table or window, or its whole range where it has none."""
    for place in source.places("FrameVOILUTSequence"):
        tables = place.get("VOILUTSequence")
        if tables and tables[0].get("LUTData") is not None:
            signed = modality.signed(source.samples)
            return _ByTable(read_table(tables[0], little=source.little, signed=signed, name=source.name), whole=True)
        # several windows are alternatives: the first that can be used
        for center, width in zip(_several(place.get("WindowCenter")), _several(place.get("WindowWidth")), strict=False):
            if center is not None and width is not None and width > 0:
                law = place.get("VOILUTFunction") or source.dataset.get("VOILUTFunction")
                function = str(law or "LINEAR").strip().upper()
                if function not in {"LINEAR", "LINEAR_EXACT", "SIGMOID"}:
                    raise DataError(f"{source.name}: a window by an unknown function; give a window (--window)")
                return _Function(function, center, width)
    return _range(source, modality, blocks)


def _range(source: Source, modality: _Rescale | _ByTable, blocks: list[NDArray[Any]]) -> _Function:
    """From the smallest to the largest value of what is no padding."""
    padding = _padding(source)
    ends: list[float] = []
    for block in blocks:
        stored = source.samples.of_cells(block)
        values = modality.apply(stored)
        inside = np.isfinite(values)
        if padding is not None:
            inside &= (stored < padding[0]) | (stored > padding[1])
        kept = values[inside]
        ends += [float(kept.min()), float(kept.max())] if kept.size else []
    return _Function("RANGE", min(ends, default=0.0), max(ends, default=0.0))


def _padding(source: Source) -> tuple[float, float] | None:
    """The smallest and the largest stored value that is padding.

    Both have the sign of the pixels, whatever their type says, and may stand in any functional group.

    Source: DICOM PS3.3 C.7.5.1.1.2.
    """
    samples = source.samples
    for value, limit in (_FLOAT_PADDING, _DOUBLE_PADDING) if samples.floating else (_PADDING,):
        ends = [_number(_anywhere(source, keyword)) for keyword in (value, limit)]
        if ends[0] is None:
            continue
        found = [end if samples.floating else _in_samples(int(end), samples) for end in ends if end is not None]
        return min(found), max(found)
    return None


def _in_samples(value: int, samples: Samples) -> int:
    """A padding value as the samples hold it: it has 16 bits, or those of a sample, and the sign of a sample."""
    for bits in (16, samples.bits):
        value &= (1 << bits) - 1
        value -= 1 << bits if samples.signed and value >> (bits - 1) else 0
        if samples.low <= value <= samples.high:
            break
    return value


def _anywhere(source: Source, keyword: str) -> Any:
    """An attribute in any functional group of the frame, in any of all frames, or at the top."""
    for groups in source.groups():
        for element in groups:
            items = [element.value[0]] if element.VR == "SQ" and element.value else []
            found = next((item.get(keyword) for item in [groups, *items] if item.get(keyword) is not None), None)
            if found is not None:
                return found
    return source.dataset.get(keyword)


def _linear(values: NDArray[Any], center: float, width: float) -> NDArray[Any]:
    """The default function: the window's ends count as in PS3.3 C.11.2.1.2.1, with its halves and ones."""
    if width <= 1.0:
        return (values > center - 0.5).astype(np.float64)
    return (values - (center - 0.5)) / (width - 1.0) + 0.5


def _several(value: Any) -> list[float | None]:
    """The numbers of an attribute of one or many values."""
    many = hasattr(value, "__len__") and not isinstance(value, str | bytes)
    return [_number(one) for one in (value if many else [value])]


def _number(value: Any) -> float | None:
    """A finite number; None for nothing, several, or what is no number."""
    if value is None or isinstance(value, str | bytes) or hasattr(value, "__len__"):
        return None
    return float(value) if np.isfinite(float(value)) else None
