"""Good DICOM files of many forms, and files whose headers say what no device writes."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.data import get_testdata_file
from pydicom.multival import MultiValue

from tests.embeddings.readers.dicom_files import (
    NATIVE,
    PACKED,
    Dataset,
    ExplicitVRBigEndian,
    FileDataset,
    dataset_of,
    table_item,
)

_INSTALLED = ("CT_small.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm", "MR_small_jpeg_ls_lossless.dcm")
_INSTALLED += ("MR_small_jp2klossless.dcm", "rtdose_1frame.dcm", "image_dfl.dcm", "liver_1frame.dcm", "JPGExtended.dcm")
_WORDS = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel", "PlanarConfiguration")
_WORDS += ("Rows", "Columns", "PixelPaddingValue", "PixelPaddingRangeLimit")
_DECIMALS = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth")
_DECIMALS += ("ImagePositionPatient", "ImageOrientationPatient")
_TEXTS = ("PhotometricInterpretation", "VOILUTFunction", "PatientID", "SeriesInstanceUID", "NumberOfFrames")
_TEXTS += ("InstanceNumber", "SpecificCharacterSet")
_ODD_TEXTS = ("", " ", "RGB", "YBR_FULL", "YBR_FULL_422", "PALETTE COLOR", "MONOCHROME1", "HSV", "SIGMOID")
_ODD_TEXTS += ("LINEAR_EXACT", "LOG", "ANONYMOUS", "  p1", "p1", "1\\2", "\0", "ü", "2", "-1", "99999", "1.5", "x" * 70)
_NUMBERS = (0, 1, 2, 3, 7, 8, 12, 15, 16, 17, 24, 32, 33, 64, 100, 32_767)
_ODD_DECIMALS = (0, -1, 1e-300, 1e300, 0.5, 65_536, "nan", "inf", "", [1, 2], [0, 0, 0], [1, 0, 0, 0, 1, 0], [5, ""])


def _group(keyword: str, **values: Any) -> Dataset:
    inner, outer = Dataset(), Dataset()
    for name, value in values.items():
        setattr(inner, name, value)
    setattr(outer, keyword, [inner])
    return outer


def good(rng: random.Random) -> FileDataset:
    """A good file of any form."""
    syntax, numbers = rng.choice([*NATIVE, *PACKED]), np.random.default_rng(rng.randrange(1 << 32))
    colour = rng.random() < 0.3
    bits = rng.choice([8, 12, 16])
    shape = (33, 34, 3) if colour else (rng.choice([1, 2]), 33, 34)
    header: dict[str, Any] = {"BitsStored": bits, "PatientID": rng.choice(["p1", "p2"]), "SeriesInstanceUID": "1.2.3"}
    header |= {"SamplesPerPixel": 3, "PhotometricInterpretation": rng.choice(["RGB", "YBR_FULL"])} if colour else {}
    table = numbers.integers(0, 256, 300).astype("<u2")
    table = table.astype(">u2") if syntax == ExplicitVRBigEndian else table
    item = table_item((300, 5, rng.choice([8, 16])), table.tobytes())
    more: list[dict[str, Any]] = [
        {},
        {"WindowCenter": 40, "WindowWidth": 80, "VOILUTFunction": rng.choice(["LINEAR", "SIGMOID"])},
        {"VOILUTSequence": [item]},
        {"ModalityLUTSequence": [item]},
        {"RescaleSlope": 2, "RescaleIntercept": -1024, "PixelPaddingValue": 5},
        {"PerFrameFunctionalGroupsSequence": [_group("FrameVOILUTSequence", WindowCenter=4, WindowWidth=9)] * 2},
        {"PerFrameFunctionalGroupsSequence": [_group("PlanePositionSequence", ImagePositionPatient=[1, 2, 3])] * 2},
    ]
    dataset = dataset_of(
        numbers.integers(0, 1 << bits, shape), syntax, **header, **({} if colour else rng.choice(more))
    )
    if not colour and rng.random() < 0.2:
        dataset.PhotometricInterpretation = "PALETTE COLOR"
        prefix = rng.choice(["", "Segmented"])
        for name in ("Red", "Green", "Blue"):
            dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [300, 0, 16])
            dataset.add_new(f"{prefix}{name}PaletteColorLookupTableData", "OW", table.tobytes())
    return dataset


def written(dataset: FileDataset) -> bytes:
    """A data set as a file's bytes."""
    sink = io.BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def odd_dicom(rng: random.Random) -> bytes:
    """A file in whose header one to three attributes are odd, or gone, here or in a sequence."""
    while True:
        dataset = good(rng)
        for _ in range(rng.choice([1, 1, 2, 3])):
            items = [element.value[0] for element in dataset if element.VR == "SQ" and element.value]
            _change(rng, rng.choice([dataset, dataset, *items]))
        try:
            return written(dataset)
        except Exception:  # pydicom itself can't write it
            continue


def _change(rng: random.Random, dataset: Any) -> None:
    way = rng.random()
    if way < 0.15:
        known = [element.tag for element in dataset if element.tag.group != 0x0008]
        if known:
            del dataset[rng.choice(known)]
    elif way < 0.5:
        kind = rng.choice(["US", "SS"])
        dataset.add_new(rng.choice(_WORDS), kind, rng.choice([*_NUMBERS, 65_535 if kind == "US" else -1]))
    elif way < 0.7:
        dataset.add_new(rng.choice(_DECIMALS), "DS", rng.choice(_ODD_DECIMALS))
    elif way < 0.9:
        dataset.add_new(rng.choice(_TEXTS), "LO", rng.choice(_ODD_TEXTS))
    else:
        tables = [element for element in dataset if "Descriptor" in element.keyword or element.keyword == "LUTData"]
        if tables:
            element = rng.choice(tables)
            bits, count = rng.choice([0, 1, 7, 8, 12, 16, 17, 40_000]), rng.choice([0, 1, 2, 299, 300, 301, 65_535])
            several = isinstance(element.value, MultiValue | list)
            odd = [count, rng.choice([0, 5, 65_535, 32_768]), bits]
            element.value = odd if several else rng.randbytes(rng.choice([0, 2, 300]))


def _seeds() -> list[bytes]:
    rng = random.Random(0)
    made = [written(good(rng)) for _ in range(30)]
    return made + [Path(str(get_testdata_file(name, download=False))).read_bytes() for name in _INSTALLED]


DICOMS = _seeds()
