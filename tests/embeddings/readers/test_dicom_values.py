"""Kinds of DICOM files by their sample values, windows and padding, against the standard's formulas."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from embeddings.readers.dicom import read_frame
from tests.embeddings.readers.dicom_files import (
    JPEG,
    NATIVE,
    PACKED,
    Dataset,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    cells_of,
    dataset_of,
    range_of,
    save,
    table_item,
    window_of,
    wrap,
)

RNG = np.random.default_rng(3)
FAST = settings(max_examples=300)


def _shown(tmp_path: Path, dataset: Any, frame: int = 0) -> np.ndarray:
    return read_frame(save(tmp_path / "a.dcm", dataset), "a.dcm", frame)


def _refused(tmp_path: Path, dataset: Any, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        _shown(tmp_path, dataset)
    assert str(caught.value).startswith("a.dcm: ")
    assert "\n" not in str(caught.value)


def _colour(bits: int, signed: bool = False) -> np.ndarray:
    low = -(1 << bits - 1) if signed else 0
    values = RNG.integers(low, low + (1 << bits), (34, 37, 3))
    values[0, 0] = low
    values[0, 1] = low + (1 << bits) - 1
    return values


@pytest.mark.parametrize("syntax", [*NATIVE, *PACKED])
@pytest.mark.parametrize(("allocated", "bits"), [(8, 8), (8, 6), (16, 8), (16, 10), (16, 12), (16, 15), (16, 16)])
def test_colour_lies_in_the_range_of_the_bits_stored(tmp_path: Path, syntax: Any, allocated: int, bits: int) -> None:
    values = _colour(bits)
    dataset = dataset_of(
        values, syntax, SamplesPerPixel=3, PhotometricInterpretation="RGB", BitsAllocated=allocated, BitsStored=bits
    )
    expected = values >> (bits - 8) if bits >= 8 else np.rint(values * 255 / (2**bits - 1))
    np.testing.assert_array_equal(_shown(tmp_path, dataset), expected)


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless])
def test_colour_above_the_low_bits_of_its_cell_among_other_bits(tmp_path: Path, syntax: Any) -> None:
    values, junk = _colour(10), RNG.integers(0, 1 << 16, (34, 37, 3))
    form = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "BitsStored": 10, "HighBit": 13}
    dataset = dataset_of(cells_of(values, 10, 13, junk), syntax, **form)
    np.testing.assert_array_equal(_shown(tmp_path, dataset), values >> 2)


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless])
def test_signed_colour_has_its_least_intensity_at_the_smallest_value(tmp_path: Path, syntax: Any) -> None:
    values = _colour(12, signed=True)
    form = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "BitsStored": 12, "PixelRepresentation": 1}
    dataset = dataset_of(values, syntax, **form)
    np.testing.assert_array_equal(_shown(tmp_path, dataset), (values + 2048) >> 4)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_luminance_and_colour_differences_of_any_bits(tmp_path: Path, bits: int) -> None:
    values = _colour(bits)
    form = {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL", "BitsStored": bits}
    y, cb, cr = (values[..., channel].astype(float) - (channel > 0) * 2 ** (bits - 1) for channel in range(3))
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    expected = np.clip(rgb, 0, 2**bits - 1) / 2 ** (bits - 8)
    shown = _shown(tmp_path, dataset_of(values, **form))
    assert np.abs(shown - np.minimum(expected, 255)).max() <= 1


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"HighBit": 15, "BitsStored": 17}, "can't be placed"),
        ({"HighBit": 9, "BitsStored": 12}, "can't be placed"),
        ({"HighBit": 16, "BitsStored": 12}, "can't be placed"),
        ({"PixelRepresentation": 2}, "can't be placed"),
        ({"PhotometricInterpretation": "RGB"}, "pixels of 1 samples as RGB"),
        ({"PhotometricInterpretation": "HSV"}, "as HSV"),
        ({"PhotometricInterpretation": "YBR_RCT"}, "as YBR_RCT"),
        ({"RescaleSlope": 0, "RescaleIntercept": 5}, "rescale slope of 0"),
        ({"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "LOG"}, "unknown function"),
    ],
)
def test_what_cannot_be_placed_is_refused(tmp_path: Path, attributes: dict[str, Any], text: str) -> None:
    _refused(tmp_path, dataset_of(np.arange(12).reshape(3, 4), **attributes), text)


@pytest.mark.parametrize("colour", ["MONOCHROME2", "YBR_PARTIAL_422", "ARGB"])
def test_colour_of_another_kind_is_refused(tmp_path: Path, colour: str) -> None:
    form = {"SamplesPerPixel": 3, "PhotometricInterpretation": colour, "BitsAllocated": 8}
    _refused(tmp_path, dataset_of(_colour(8), **form), f"as {colour}")


@pytest.mark.parametrize("signed", [0, 1])
def test_jpeg_2000_frames_of_more_or_fewer_bits_than_the_header_says(tmp_path: Path, signed: int) -> None:
    values = np.arange(-2048 * signed, 4096 - 2048 * signed).reshape(64, 64)
    form = {"BitsStored": 12, "PixelRepresentation": signed, "WindowCenter": 1000, "WindowWidth": 3000}
    expected = window_of(values, 1000, 3000, "LINEAR")
    more = dataset_of(values, JPEG2000Lossless, **form | {"BitsStored": 16})
    more.BitsStored, more.HighBit = 12, 11
    assert np.abs(_shown(tmp_path, more) - expected).max() <= 0.5
    fewer = dataset_of(values, JPEG2000Lossless, **form)
    fewer.BitsStored, fewer.HighBit = 16, 15
    assert np.abs(_shown(tmp_path, fewer) - expected).max() <= 0.5
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "BitsStored": 12}
    unclear = dataset_of(_colour(12), JPEG2000Lossless, **colour)
    unclear.BitsStored, unclear.HighBit = 16, 15
    _refused(tmp_path, unclear, "in a frame of 12 bits")
    between = dataset_of(values, JPEG2000Lossless, **form)
    between.BitsStored, between.HighBit = 10, 15
    _refused(tmp_path, between, "in a frame of 12 bits")


@pytest.mark.parametrize("header", [(8, 8, 0), (16, 8, 0), (16, 12, 0), (16, 8, 1)])
@pytest.mark.parametrize("colour", ["MONOCHROME2", "YBR_FULL_422", "RGB"])
def test_jpeg_of_bytes_in_cells_of_any_size(tmp_path: Path, header: tuple[int, int, int], colour: str) -> None:
    """Against Pillow's decoder; a signed frame and colour of fewer bits than the header says can't be placed."""
    allocated, bits, signed = header
    ramp = np.cumsum(RNG.integers(0, 3, (48, 64)), axis=1)
    values = (ramp if colour == "MONOCHROME2" else np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1)).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(values).save(
        sink, "JPEG", quality=95, subsampling=0, **({"keep_rgb": True} if colour == "RGB" else {})
    )
    form = {"BitsAllocated": allocated, "BitsStored": bits, "PixelRepresentation": signed}
    samples = 1 if values.ndim == 2 else 3
    dataset = dataset_of(values, PhotometricInterpretation=colour, SamplesPerPixel=samples, **form)
    wrap(dataset, JPEG, [sink.getvalue()])
    if samples == 3 and (signed or bits == 12):
        _refused(tmp_path, dataset, "can't be placed")
        return
    decoded = np.asarray(Image.open(sink)).astype(float)
    if signed:
        decoded -= 256 * (decoded > 127)
    expected = range_of(decoded, np.zeros(decoded.shape, bool)) if samples == 1 else decoded
    assert np.abs(_shown(tmp_path, dataset) - expected).max() <= 4


@st.composite
def _grey(draw: st.DrawFn) -> dict[str, Any]:
    """A grey picture of any legal form: cells, header, and its values."""
    syntax = draw(st.sampled_from([*NATIVE, *PACKED]))
    allocated = draw(st.sampled_from([8, 16]))
    bits = draw(st.integers(1, allocated))
    if syntax == JPEG2000Lossless:
        bits = max(bits, 2)
    high = bits - 1 if syntax == JPEG2000Lossless else draw(st.integers(bits - 1, allocated - 1))
    signed = draw(st.integers(0, 1))
    low = -(1 << bits - 1) if signed else 0
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    values = rng.integers(low, low + (1 << bits), (33, 40))
    padded = draw(st.booleans())
    ends = sorted(int(value) for value in rng.integers(low, low + (1 << bits), 2))
    ends = ends if draw(st.booleans()) else [ends[0]] * 2
    if padded:
        values[:2] = rng.integers(ends[0], ends[1] + 1, (2, 40))
    junk = rng.integers(0, 1 << allocated, (33, 40))
    if syntax == JPEG2000Lossless:
        junk = np.where(values < 0, -1, 0)
    header: dict[str, Any] = {"BitsAllocated": allocated, "BitsStored": bits, "HighBit": high}
    header |= {"PixelRepresentation": signed}
    header |= {"PhotometricInterpretation": draw(st.sampled_from(["MONOCHROME1", "MONOCHROME2"]))}
    slope = draw(st.sampled_from([1.0, 2.0, 0.5, -1.0, 0.037]))
    intercept = draw(st.sampled_from([0.0, -1024.0, 7.5]))
    if draw(st.booleans()):
        header |= {"RescaleSlope": slope, "RescaleIntercept": intercept}
    else:
        slope, intercept = 1.0, 0.0
    window = None
    if draw(st.booleans()):
        function = draw(st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]))
        width = draw(st.sampled_from([1, 2, 3, 80, 81, 400.5, 4096, 65536] + [0.25] * (function != "LINEAR")))
        window = (draw(st.integers(-3000, 3000)), width, function)
        several = draw(st.booleans())
        header |= {"WindowCenter": [window[0], 77] if several else window[0]}
        header |= {"WindowWidth": [width, 5] if several else width}
        if function != "LINEAR" or draw(st.booleans()):
            header["VOILUTFunction"] = function
    if padded:
        unsigned = draw(st.booleans())  # of whatever type the writer chose
        kind = "US" if unsigned else "SS"
        wrapped = [end & 0xFFFF if unsigned else (end & 0xFFFF) - ((end & 0x8000) << 1) for end in ends]
        wrapped = wrapped[::-1] if draw(st.booleans()) else wrapped  # with white at zero the limit is the lower one
        header["padding"] = (kind, wrapped if ends[0] != ends[1] else wrapped[:1])
    inside = ~((values >= ends[0]) & (values <= ends[1])) if padded else np.ones(values.shape, bool)
    cells = cells_of(values, bits, high, junk)
    return {
        "syntax": syntax, "cells": cells, "header": header, "values": values * slope + intercept,
        "padding": ~inside, "window": window,
    }  # fmt: skip


def _with_padding(dataset: Any, kind: str, ends: list[int]) -> None:
    for keyword, value in zip(("PixelPaddingValue", "PixelPaddingRangeLimit"), ends, strict=False):
        dataset.add_new(keyword, kind, value)


@FAST
@given(made=_grey())
def test_grey_of_every_legal_form_is_shown_by_the_formulas(tmp_path: Path, made: dict[str, Any]) -> None:
    header = dict(made["header"])
    padding = header.pop("padding", None)
    dataset = dataset_of(made["cells"], made["syntax"], **header)
    if padding is not None:
        _with_padding(dataset, *padding)
    values, window = made["values"], made["window"]
    expected = range_of(values, made["padding"]) if window is None else window_of(values, *window)
    if header["PhotometricInterpretation"] == "MONOCHROME1":
        expected = 255.0 - expected
    assert np.abs(_shown(tmp_path, dataset) - expected).max() <= 0.5 + 1e-6


@FAST
@given(
    bits=st.integers(1, 16),
    more=st.integers(0, 15),
    signed=st.integers(0, 1),
    syntax=st.sampled_from([*NATIVE, RLELossless]),
    planar=st.integers(0, 1),
)
def test_colour_of_every_legal_form(
    tmp_path: Path, bits: int, more: int, signed: int, syntax: Any, planar: int
) -> None:
    high = min(bits - 1 + more, 15)
    values = _colour(bits, bool(signed))
    cells = cells_of(values, bits, high, RNG.integers(0, 1 << 16, values.shape))
    form = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "BitsStored": bits, "HighBit": high}
    stored = cells if syntax == RLELossless or not planar else np.moveaxis(cells, -1, 0).reshape(cells.shape)
    dataset = dataset_of(stored, syntax, PixelRepresentation=signed, **form)
    dataset.PlanarConfiguration = planar if syntax != RLELossless else dataset.PlanarConfiguration
    placed = values + signed * (1 << bits - 1)
    expected = placed >> (bits - 8) if bits >= 8 else np.rint(placed * 255 / (2**bits - 1))
    np.testing.assert_array_equal(_shown(tmp_path, dataset), expected)


@pytest.mark.parametrize("where", ["top", "shared", "frame", "in a group of the frame"])
def test_padding_is_found_in_functional_groups(tmp_path: Path, where: str) -> None:
    frames = np.asarray([[[5, 6, 7, 9]], [[-2000, -1990, 100, 50]]])
    dataset = dataset_of(frames, PixelRepresentation=1)
    holder, groups = Dataset(), [Dataset(), Dataset()]
    _with_padding(holder, "US", [63536, 63546])
    if where == "top":
        _with_padding(dataset, "US", [63536, 63546])
    elif where == "shared":
        dataset.SharedFunctionalGroupsSequence = [holder]
    else:
        groups[1] = holder
        if where != "frame":
            groups[1] = Dataset()
            groups[1].PixelValueTransformationSequence = [holder]
        dataset.PerFrameFunctionalGroupsSequence = groups
    np.testing.assert_array_equal(_shown(tmp_path, dataset, 1), [[0, 0, 255, 0]])


@pytest.mark.parametrize(("double", "syntax"), [(False, ExplicitVRLittleEndian), (True, ExplicitVRLittleEndian)])
def test_floats_have_padding_of_their_own(tmp_path: Path, double: bool, syntax: Any) -> None:
    dataset = dataset_of(np.zeros((1, 4)), syntax)
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    values = np.asarray([-1e9, 0.0, 0.5, 1.0], "<f8" if double else "<f4")
    prefix = "DoubleFloat" if double else "Float"
    dataset.BitsAllocated = 64 if double else 32
    setattr(dataset, f"{prefix}PixelData", values.tobytes())
    setattr(dataset, f"{prefix}PixelPaddingValue", -2e9)
    setattr(dataset, f"{prefix}PixelPaddingRangeLimit", -1e8)
    np.testing.assert_array_equal(_shown(tmp_path, dataset), [[0, 0, 128, 255]])


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("signed", [0, 1])
def test_cells_of_32_bits(tmp_path: Path, syntax: Any, signed: int) -> None:
    values = RNG.integers(-(1 << 19) if signed else 0, 1 << (19 if signed else 20), (5, 8))
    cells = cells_of(values, 20, 25, RNG.integers(0, 1 << 32, values.shape))
    dataset = dataset_of(cells, syntax, BitsAllocated=32, BitsStored=20, HighBit=25, PixelRepresentation=signed)
    expected = range_of(values, np.zeros(values.shape, bool))
    assert np.abs(_shown(tmp_path, dataset) - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (4, 6, 3), (3, 5, 3)])
def test_bytes_in_words_of_big_endian(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = RNG.integers(0, 256, shape)
    form = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"} if len(shape) == 3 else {}
    dataset = dataset_of(values, ExplicitVRBigEndian, BitsAllocated=8, **form)
    words = np.frombuffer(dataset.PixelData, "<u2").astype(">u2")  # the first of two pixels is the lower byte
    dataset.add_new("PixelData", "OW", words.tobytes())
    expected = values if len(shape) == 3 else range_of(values, np.zeros(shape, bool))
    assert np.abs(_shown(tmp_path, dataset) - expected).max() <= 0.5 + 1e-6


def test_the_first_window_of_several_that_can_be_used(tmp_path: Path) -> None:
    values = np.asarray([[-1000, 0, 40, 80, 3000]])
    dataset = dataset_of(values, PixelRepresentation=1, WindowCenter=[0, 40, 9], WindowWidth=[0, 81, 9])
    np.testing.assert_array_equal(_shown(tmp_path, dataset), np.rint(window_of(values, 40, 81, "LINEAR")))


@pytest.mark.parametrize("group", ["PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"])
def test_tables_and_rescales_of_functional_groups_come_first(tmp_path: Path, group: str) -> None:
    values = np.asarray([[[0, 1, 2, 3]]] * 2)
    dataset = dataset_of(values, WindowCenter=500, WindowWidth=3, RescaleSlope=7)
    item, table, rescale = Dataset(), Dataset(), Dataset()
    table.VOILUTSequence = [table_item((4, 2, 8), [0, 51, 102, 255])]
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, 2
    item.FrameVOILUTSequence, item.PixelValueTransformationSequence = [table], [rescale]
    setattr(dataset, group, [Dataset(), item] if group.startswith("Per") else [item])
    np.testing.assert_array_equal(_shown(tmp_path, dataset, 1), [[0, 51, 102, 255]])
    rescale.RescaleSlope = 0
    with pytest.raises(DataError, match="rescale slope of 0"):
        _shown(tmp_path, dataset, 1)
    if group.startswith("Per"):
        np.testing.assert_array_equal(_shown(tmp_path, dataset, 0), [[0, 0, 0, 0]])


def test_a_cell_beside_the_sample_says_nothing_also_in_big_endian(tmp_path: Path) -> None:
    values = np.asarray([[0, 1, 2, 3]])
    for syntax in (ExplicitVRLittleEndian, ExplicitVRBigEndian):
        cells = cells_of(values, 2, 9, np.full((1, 4), 0xFFFF))
        dataset = dataset_of(cells, syntax, BitsStored=2, HighBit=9)
        np.testing.assert_array_equal(_shown(tmp_path, dataset), [[0, 85, 170, 255]])


@pytest.mark.parametrize("planes", [0, 1])
@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_encoded_colour_lies_pixel_by_pixel_whatever_the_header_says(tmp_path: Path, kind: str, planes: int) -> None:
    ramp = np.cumsum(RNG.integers(0, 3, (48, 64)), axis=1)
    values = np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1).astype(np.uint8)
    sink = io.BytesIO()
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"no_jp2": True, "mct": 0}
    Image.fromarray(values).save(sink, kind, **options)
    colour = "YBR_FULL_422" if kind == "JPEG" else "RGB"
    form = {"SamplesPerPixel": 3, "BitsAllocated": 8, "PlanarConfiguration": planes}
    dataset = dataset_of(values, PhotometricInterpretation=colour, **form)
    wrap(dataset, JPEG if kind == "JPEG" else JPEG2000Lossless, [sink.getvalue()])
    assert np.abs(_shown(tmp_path, dataset) - np.asarray(Image.open(sink)).astype(float)).max() <= 4


@pytest.mark.parametrize("syntax", NATIVE)
def test_native_pixels_that_are_not_what_the_header_says_are_refused(tmp_path: Path, syntax: Any) -> None:
    whole = dataset_of(_colour(8), syntax, SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422", BitsAllocated=8)
    _refused(tmp_path, whole, "is YBR_FULL or RGB")
    path = save(tmp_path / "a.dcm", dataset_of(_colour(8)[..., 0], syntax, BitsAllocated=8))
    content, size = path.read_bytes(), struct.pack(">I" if syntax == ExplicitVRBigEndian else "<I", 34 * 37)
    assert content.count(size) == 1
    path.write_bytes(content.replace(size, b"\xff" * 4))
    with pytest.raises(DataError, match="correct its transfer syntax"):
        read_frame(path, "a.dcm")


@pytest.mark.parametrize("keyword", ["BitsAllocated", "SamplesPerPixel", "PixelRepresentation"])
def test_what_the_header_does_not_state_is_named(tmp_path: Path, keyword: str) -> None:
    dataset = dataset_of(RNG.integers(0, 4096, (8, 8)), BitsStored=12)
    delattr(dataset, keyword)
    _refused(tmp_path, dataset, f"does not state {keyword}")


@pytest.mark.parametrize("colour", ["RGB", "YBR_RCT", "YBR_FULL", "YBR_FULL_422"])
def test_jpeg_2000_that_mixes_colours_gives_rgb_or_is_refused(tmp_path: Path, colour: str) -> None:
    values = _colour(8).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(values).save(sink, "JPEG2000", no_jp2=True, mct=1, irreversible=False)
    dataset = dataset_of(values, SamplesPerPixel=3, PhotometricInterpretation=colour, BitsAllocated=8)
    wrap(dataset, JPEG2000Lossless, [sink.getvalue()])
    if colour.startswith("YBR_FULL"):
        _refused(tmp_path, dataset, f"as {colour}: they can't be placed")
    else:
        np.testing.assert_array_equal(_shown(tmp_path, dataset), values)
