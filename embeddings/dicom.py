"""DICOM files to 8-bit pictures, as a viewer shows them.

Stored values go through the modality transformation (rescale or table), then the window or table of values of
interest, to 0..255; MONOCHROME1 is inverted; colour comes out as RGB whatever its stored space; 16-bit colour
keeps its upper byte. A file without a window is shown from its smallest to its largest value, padding left
out.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, DataError
from embeddings.images import check_size

MAX_FRAMES = 100_000
_HEADER_TAGS = (
    "PatientID",
    "SeriesInstanceUID",
    "InstanceNumber",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "PixelRepresentation",
)


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
class Header:
    """What listing a series needs to know of a file. `patient` never leaves the listing unhashed."""

    frames: int
    patient: str
    series: str
    position: int


def is_dicom(path: Path) -> bool:
    """Tell whether a file carries the DICOM mark (`DICM` at byte 128)."""
    try:
        with path.open("rb") as file:
            file.seek(128)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def read_header(path: Path, name: str) -> Header:
    """Read a DICOM file's header without its pixels.

    Args:
        path: the file.
        name: how messages name it.

    Returns:
        Number of frames, patient, series and position in it.

    Raises:
        DataError: it can't be read, has no image, too many pixels or frames.
        ConfigError: pydicom is not installed.
    """
    pydicom = _pydicom()
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))
        rows, columns = dataset.get("Rows"), dataset.get("Columns")
        if rows is None or columns is None:
            raise DataError(f"{name}: a DICOM file without pixels; leave it out")
        check_size(name, int(columns), int(rows))
        frames = int(dataset.get("NumberOfFrames") or 1)
        if not 1 <= frames <= MAX_FRAMES:
            raise DataError(f"{name}: expected 1 to {MAX_FRAMES:,} frames, found {frames}")
        return Header(
            frames=frames,
            patient=str(dataset.get("PatientID") or ""),
            series=str(dataset.get("SeriesInstanceUID") or ""),
            position=int(dataset.get("InstanceNumber") or 0),
        )
    except DataError:
        raise
    except Exception as error:  # a damaged header may raise anything; it must cost this file only
        raise DataError(f"{name}: the DICOM header can't be read ({type(error).__name__})") from None


def read_frame(path: Path, name: str, frame: int = 0, window: Window | None = None) -> NDArray[np.uint8]:
    """Decode one frame and show it as a viewer does.

    Args:
        path: the file.
        name: how messages name it.
        frame: 0..frames-1.
        window: replaces the file's own window and table; None keeps them.

    Returns:
        (h, w) uint8 for grey frames, (h, w, 3) uint8 for colour.

    Raises:
        DataError: the file is damaged or has no pixels.
        ConfigError: pydicom is not installed.
    """
    pydicom = _pydicom()
    try:
        dataset = pydicom.dcmread(path)
        if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise DataError(f"{name}: a DICOM file without pixels; leave it out")
        check_size(name, int(dataset.Columns), int(dataset.Rows))
        # The RLE plugin written in Rust panics on damaged input; pydicom's own decoder raises.
        plain = dataset.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless
        plugin = "pydicom" if plain else ""
        pixels = pydicom.pixels.pixel_array(dataset, index=frame, decoding_plugin=plugin)
        return render(dataset, pixels, frame, window)
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        raise DataError(f"{name}: decoding needs more memory than there is") from None
    except BaseException as error:  # decoders raise anything, also what is no Exception; it costs this file only
        raise DataError(f"{name}: the DICOM pixels can't be decoded ({type(error).__name__})") from None


def render(dataset: Any, pixels: NDArray[Any], frame: int, window: Window | None) -> NDArray[np.uint8]:
    """Turn stored values into a picture.

    Args:
        dataset: the pydicom data set they come from.
        pixels: (h, w) or (h, w, 3) stored values of one frame; colour already RGB.
        frame: number of the frame, for per-frame attributes.
        window: replaces the file's own.

    Returns:
        (h, w) or (h, w, 3) uint8.

    Source: DICOM PS3.3 C.7.6.3.1.2, C.11.1.1.2, C.11.2.1.2.
    """
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi

    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return _upper_byte(apply_color_lut(pixels, dataset), 16)
    if pixels.ndim == 3:
        return _upper_byte(pixels, int(dataset.BitsAllocated))
    padding = dataset.get("PixelPaddingValue")
    valid = np.ones(pixels.shape, dtype=bool) if padding is None else pixels != padding
    if "ModalityLUTSequence" in dataset:
        values = np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64)
    else:
        slope = _attribute(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = _attribute(dataset, frame, "PixelValueTransformationSequence", "RescaleIntercept")
        slope = 1.0 if slope is None else float(slope)
        values = pixels * slope + (0.0 if intercept is None else float(intercept))
    if window is not None:
        shown = _linear(values, window.center, window.width)
    elif dataset.get("VOILUTSequence"):
        table = dataset.VOILUTSequence[0]
        looked_up = apply_voi(values.astype(np.int64), dataset, index=0)
        shown = looked_up / (2.0 ** int(table.LUTDescriptor[2]) - 1.0)
    else:
        shown = _windowed(dataset, frame, values, valid)
    picture = np.rint(np.clip(shown, 0.0, 1.0) * 255.0).astype(np.uint8)
    return 255 - picture if dataset.PhotometricInterpretation == "MONOCHROME1" else picture


def _windowed(dataset: Any, frame: int, values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[Any]:
    center = _first(_attribute(dataset, frame, "FrameVOILUTSequence", "WindowCenter"))
    width = _first(_attribute(dataset, frame, "FrameVOILUTSequence", "WindowWidth"))
    function = _attribute(dataset, frame, "FrameVOILUTSequence", "VOILUTFunction") or "LINEAR"
    if center is None or width is None or width <= 0:
        inside = values[valid & np.isfinite(values)]
        low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0)
        return (values - low) / (high - low) if high > low else np.zeros(values.shape)
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))
    if function == "LINEAR_EXACT":
        return (values - (center - width / 2.0)) / width
    return _linear(values, center, width)


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


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError:
        raise ConfigError("DICOM files need pydicom: pip install 'fedhypevae[dicom]'") from None
    # A value outside its type's rules is no reason to refuse a picture; and a warning may quote a header.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return pydicom
