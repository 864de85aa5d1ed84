"""DICOM files made to measure, and what a viewer shows of them by the standard's formulas, without pydicom."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("pylibjpeg")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

JPEG = JPEGBaseline8Bit
NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
PACKED = (RLELossless, JPEG2000Lossless)


def cells_of(values: np.ndarray, bits: int, high: int, junk: np.ndarray | None = None) -> np.ndarray:
    """Cells in which the samples lie below the high bit, and `junk` in all other bits. Source: PS3.5 8.1.1."""
    shift = high - bits + 1
    mask = ((1 << bits) - 1) << shift
    return ((values.astype(np.int64) << shift) & mask) | ((0 if junk is None else junk.astype(np.int64)) & ~mask)


def dataset_of(cells: np.ndarray, syntax: Any = ExplicitVRLittleEndian, **attributes: Any) -> FileDataset:
    """A data set of cells, (h, w), (h, w, 3) or (frames, h, w) by its attributes; see `save`."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3.4"
    meta.TransferSyntaxUID = syntax if syntax in NATIVE else ExplicitVRLittleEndian
    kind = {"is_implicit_VR": meta.TransferSyntaxUID.is_implicit_VR}
    kind |= {"is_little_endian": meta.TransferSyntaxUID.is_little_endian}
    dataset = FileDataset(None, {}, file_meta=meta, preamble=bytes(128), **kind)
    known: dict[str, Any] = {"SOPClassUID": CTImageStorage, "SOPInstanceUID": "1.2.3.4", "SamplesPerPixel": 1}
    known |= {"PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "PixelRepresentation": 0} | attributes
    known.setdefault("BitsStored", known["BitsAllocated"])
    known.setdefault("HighBit", known["BitsStored"] - 1)
    shape = cells.shape[:2] if known["SamplesPerPixel"] == 3 else cells.shape[-2:]
    known |= {"Rows": shape[0], "Columns": shape[1]}
    if known["SamplesPerPixel"] == 3:
        known.setdefault("PlanarConfiguration", 0)
    known.setdefault("NumberOfFrames", len(cells) if known["SamplesPerPixel"] == 1 and cells.ndim == 3 else 1)
    for keyword, value in known.items():
        setattr(dataset, keyword, value)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    width = known["BitsAllocated"] // 8
    data = (cells.astype(np.int64) & ((1 << 8 * width) - 1)).astype(f"{order}u{width}").tobytes()
    dataset.PixelData = data + bytes(len(data) % 2)
    dataset["PixelData"].VR = "OB" if width == 1 and syntax != ImplicitVRLittleEndian else "OW"
    if syntax == JPEG2000Lossless:
        dataset.compress(syntax, encoding_plugin="pylibjpeg")
    elif syntax == RLELossless:  # by hand: pydicom drops the upper byte of cells of 16 bits where 8 are stored
        count = known["NumberOfFrames"]
        planes = np.frombuffer(data, np.uint8).reshape(count, -1, known["SamplesPerPixel"], width)
        wrap(dataset, syntax, [_run_lengths(frame.transpose(1, 2, 0)[:, ::-1]) for frame in planes])
    return dataset


def wrap(dataset: FileDataset, syntax: Any, frames: list[bytes]) -> None:
    """Put encoded frames into a data set."""
    dataset.PixelData = encapsulate(frames)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True


def _run_lengths(planes: np.ndarray) -> bytes:
    """An RLE frame of byte planes (samples, bytes, pixels), upper byte first, without any run. Source: PS3.5 G."""
    segments = []
    for plane in planes.reshape(-1, planes.shape[-1]):
        pieces = [plane[start : start + 128].tobytes() for start in range(0, plane.size, 128)]
        segment = b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)
        segments.append(segment + bytes(len(segment) % 2))
    starts = [64 + sum(len(segment) for segment in segments[:number]) for number in range(len(segments))]
    return struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(starts))) + b"".join(segments)


def save(path: Path, dataset: FileDataset) -> Path:
    """Write a data set in its transfer syntax."""
    dataset.save_as(path, enforce_file_format=True)
    return path


def table_item(descriptor: tuple[int, int, int], data: bytes | list[int], signed: bool = False) -> Dataset:
    """An item of a modality or VOI LUT sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if signed else "US", list(descriptor))
    item.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return item


def window_of(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values to 0..255 by PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID) and C.11.2.1.3.2 (LINEAR_EXACT)."""
    x = values.astype(np.float64)
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 255.0 / (1.0 + np.exp(-4.0 * (x - center) / width))
    if function == "LINEAR":
        low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
        slope = np.zeros_like(x) if width == 1 else ((x - (center - 0.5)) / (width - 1) + 0.5) * 255.0
    else:
        low, high = center - width / 2, center + width / 2
        slope = ((x - center) / width + 0.5) * 255.0
    return np.where(x <= low, 0.0, np.where(x > high, 255.0, slope))


def range_of(values: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """Values to 0..255 from the smallest to the largest of those that are no padding."""
    inside = values[~padding]
    if not inside.size or inside.min() == inside.max():
        return np.zeros(values.shape)
    return np.clip((values - inside.min()) / (inside.max() - inside.min()), 0.0, 1.0) * 255.0
