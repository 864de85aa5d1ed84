"""Lookup tables of DICOM files in every form that a writer may choose, against a lookup written out here."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from embeddings.readers.dicom import read_frame
from tests.embeddings.readers.dicom_files import (
    NATIVE,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    dataset_of,
    range_of,
    save,
    table_item,
    window_of,
)

FAST = settings(max_examples=300)
COLOURS = ("Red", "Green", "Blue")


def _shown(tmp_path: Path, dataset: Any) -> np.ndarray:
    return read_frame(save(tmp_path / "a.dcm", dataset), "a.dcm")


def _packed(entries: np.ndarray, form: str, syntax: Any) -> bytes | list[int]:
    """Entries as bytes or as words, in the file's order of bytes; or as a list of words, packed or not."""
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    raw = entries.astype("<u1").tobytes() if "bytes" in form else entries.astype("<u2").tobytes()
    words = np.frombuffer(raw + bytes(len(raw) % 2), "<u2")  # of two entries of a byte, the first is the lower one
    return words.tolist() if "list" in form else words.astype(f"{order}u2").tobytes()


def _looked_up(table: np.ndarray, first: int, values: np.ndarray) -> np.ndarray:
    """The standard's words in numbers: below the first input the first entry, beyond the last one the last entry."""
    return np.asarray([table[0 if v < first else min(v - first, len(table) - 1)] for v in values.ravel().tolist()])


@st.composite
def _case(draw: st.DrawFn) -> dict[str, Any]:
    syntax = draw(st.sampled_from(NATIVE))
    signed = draw(st.integers(0, 1))
    first = draw(st.integers(-300 if signed else 0, 300) | st.sampled_from([-32768, -1] if signed else [0, 40_000]))
    count = draw(st.integers(2, 700))
    form = draw(st.sampled_from(["bytes", "words", "list", "bytes list"]))
    bits = 8 if "bytes" in form else draw(st.sampled_from([8, 10, 12, 16]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    table = rng.integers(0, 1 << bits, count)
    table[rng.integers(count)] = (1 << bits) - 1  # so that its depth can be seen
    low, high = (-32768, 32768) if signed else (0, 65536)
    values = rng.integers(max(low, first - 50), min(high, first + count + 50), (5, 8))
    told = draw(st.sampled_from([bits, 16]))
    return {
        "syntax": syntax, "signed": signed, "first": first, "table": table, "bits": bits, "form": form,
        "values": values, "descriptor": (count, first, told), "exact": told == bits,
    }  # fmt: skip


def _item(case: dict[str, Any]) -> Any:
    count, first, bits = case["descriptor"]
    vr_signed = first < 0 and case["form"] != "list"  # both types are met in files, for the same bits
    number = first if vr_signed else first & 0xFFFF
    return table_item((count, number, bits), _packed(case["table"], case["form"], case["syntax"]), vr_signed)


def _grey(case: dict[str, Any], **attributes: Any) -> Any:
    return dataset_of(case["values"], case["syntax"], PixelRepresentation=case["signed"], **attributes)


@FAST
@given(case=_case())
def test_table_of_values_of_interest(tmp_path: Path, case: dict[str, Any]) -> None:
    """The entries are spread over 0..255 by the bits they have, also where the descriptor says more."""
    found = _looked_up(case["table"], case["first"], case["values"]) / (2 ** case["bits"] - 1) * 255
    shown = _shown(tmp_path, _grey(case, VOILUTSequence=[_item(case)], WindowCenter=1, WindowWidth=5))
    assert np.abs(shown.ravel() - found).max() <= 0.5 + 1e-6


@FAST
@given(case=_case(), window=st.booleans())
def test_modality_table_comes_before_the_window(tmp_path: Path, case: dict[str, Any], window: bool) -> None:
    found = _looked_up(case["table"], case["first"], case["values"])
    more = {"WindowCenter": 100, "WindowWidth": 150} if window else {}
    expected = window_of(found, 100, 150, "LINEAR") if window else range_of(found, np.zeros(found.shape, bool))
    shown = _shown(tmp_path, _grey(case, ModalityLUTSequence=[_item(case)], **more))
    assert np.abs(shown.ravel() - expected).max() <= 0.5 + 1e-6


@FAST
@given(case=_case())
def test_palette(tmp_path: Path, case: dict[str, Any]) -> None:
    if "list" in case["form"] or case["bits"] not in (8, 16):
        return  # palettes are words of bytes, of 8 or 16 bits
    dataset = _grey(case, PhotometricInterpretation="PALETTE COLOR")
    expected = []
    for number, colour in enumerate(COLOURS):
        table = np.roll(case["table"], number)
        count, first, bits = case["descriptor"]
        kind = "SS" if first < 0 else "US"
        dataset.add_new(f"{colour}PaletteColorLookupTableDescriptor", kind, [count, first, bits])
        dataset.add_new(f"{colour}PaletteColorLookupTableData", "OW", _packed(table, case["form"], case["syntax"]))
        expected.append(_looked_up(table, case["first"], case["values"]) >> (case["bits"] - 8))
    np.testing.assert_array_equal(_shown(tmp_path, dataset).reshape(-1, 3), np.stack(expected, axis=-1))


@pytest.mark.parametrize("form", ["words", "bytes", "list", "bytes list"])
@pytest.mark.parametrize("kind", ["VOILUTSequence", "ModalityLUTSequence", "PALETTE COLOR"])
def test_eight_bits_of_4096_entries(tmp_path: Path, kind: str, form: str) -> None:
    """Each entry stands for sixteen inputs: an index of one byte would begin again after 256."""
    values, table = np.arange(4096).reshape(64, 64), np.arange(4096) // 16
    packed = _packed(table, form, ExplicitVRLittleEndian)
    if kind == "PALETTE COLOR":
        dataset = dataset_of(values, PhotometricInterpretation=kind)
        for colour in COLOURS:
            dataset.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [4096, 0, 8])
            data = packed if isinstance(packed, bytes) else np.asarray(packed, "<u2").tobytes()
            dataset.add_new(f"{colour}PaletteColorLookupTableData", "OW", data)
        expected = np.repeat(values[..., None] // 16, 3, axis=-1)
    else:
        dataset = dataset_of(values, BitsStored=12, **{kind: [table_item((4096, 0, 8), packed)]})
        expected = values // 16
    np.testing.assert_array_equal(_shown(tmp_path, dataset), expected)


def test_table_of_65536_entries(tmp_path: Path) -> None:
    table = np.arange(65536)[::-1]
    item = table_item((0, 0, 16), table.astype("<u2").tobytes())
    values = np.asarray([[0, 1000, 40_000, 65_535]])
    expected = np.rint((65535 - values) / 65535 * 255)
    np.testing.assert_array_equal(_shown(tmp_path, dataset_of(values, VOILUTSequence=[item])), expected)


@pytest.mark.parametrize(("first", "kind"), [(-1024, "SS"), (64512, "US")])
def test_a_rescale_below_zero_makes_the_first_input_signed(tmp_path: Path, first: int, kind: str) -> None:
    """Source: PS3.3 C.11.2.1.1: signed where the possible output of the rescale may be."""
    table = np.arange(256)
    item = table_item((256, first, 8), table.astype("<u1").tobytes(), kind == "SS")
    dataset = dataset_of(
        np.asarray([[0, 10, 255, 3000]]), RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=[item]
    )
    np.testing.assert_array_equal(_shown(tmp_path, dataset), [[0, 10, 255, 255]])


@pytest.mark.parametrize(
    ("told", "entries", "bits"),
    [
        (16, [0, 100, 255, 200], 8),
        (12, [0, 9, 30, 9], 8),
        (16, [0, 2000, 4095, 3000], 12),
        (16, [0, 9, 40_000, 9], 16),
        (16, [0, 20_000, 9, 5_000], 16),
        (12, [0, 9, 3000, 9], 12),
        (8, [0, 65_535, 9, 30_000], 16),
    ],
)
def test_a_descriptor_that_says_other_bits_than_entries_have(
    tmp_path: Path, told: int, entries: list[int], bits: int
) -> None:
    item = table_item((4, 0, told), np.asarray(entries, "<u2").tobytes())
    expected = np.rint(np.asarray([entries]) / (2**bits - 1) * 255)
    shown = _shown(tmp_path, dataset_of(np.arange(4)[None], VOILUTSequence=[item]))
    np.testing.assert_array_equal(shown, expected)


def _segmented(tmp_path: Path, segments: bytes, count: int, bits: int, syntax: Any = ExplicitVRLittleEndian) -> Any:
    dataset = dataset_of(np.arange(count)[None], syntax, PhotometricInterpretation="PALETTE COLOR")
    for colour in COLOURS:
        dataset.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [count, 0, bits])
        dataset.add_new(f"Segmented{colour}PaletteColorLookupTableData", "OW", segments)
    return _shown(tmp_path, dataset)[0, :, 0].tolist()


@pytest.mark.parametrize("syntax", NATIVE)
def test_palette_in_segments(tmp_path: Path, syntax: Any) -> None:
    """Two entries, a line of four to 2560, and both again: by hand from PS3.3 C.7.9.2."""
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    segments = struct.pack(f"{order}11H", 0, 2, 256, 512, 1, 4, 2560, 2, 2, 0, 0)
    expected = [1, 2, 4, 6, 8, 10, 1, 2, 4, 6, 8, 10]
    assert _segmented(tmp_path, segments, 12, 16, syntax) == expected
    narrow = np.frombuffer(bytes([0, 2, 1, 2, 1, 4, 10, 2, 2, 0, 0, 0, 0]) + b"\0", "<u2").astype(f"{order}u2")
    assert _segmented(tmp_path, narrow.tobytes(), 12, 8, syntax) == expected
    from_the_line = struct.pack(f"{order}11H", 0, 2, 256, 512, 1, 4, 2560, 2, 1, 8, 0)
    with_line = _segmented(tmp_path, from_the_line, 10, 16, syntax)
    assert with_line == [1, 2, 4, 6, 8, 10, 10, 10, 10, 10]


def test_tables_that_are_none_are_refused_in_one_line(tmp_path: Path) -> None:
    values = np.arange(8)[None]
    cases = {
        "expected 300 entries": {"VOILUTSequence": [table_item((300, 0, 8), bytes(8))]},
        "expected 5 entries": {"ModalityLUTSequence": [table_item((5, 0, 16), bytes(8))]},
        "without three numbers": {"ModalityLUTSequence": [table_item((300, 0), bytes(8))]},  # type: ignore[arg-type]
    }
    for text, attributes in cases.items():
        with pytest.raises(DataError, match=f"^a.dcm: a lookup table .*{text}"):
            _shown(tmp_path, dataset_of(values, **attributes))
    with pytest.raises(DataError, match=r"^a.dcm: a lookup table without three numbers"):
        _shown(tmp_path, dataset_of(values, PhotometricInterpretation="PALETTE COLOR"))
    with pytest.raises(DataError, match=r"^a.dcm: "):  # an endless one
        _segmented(tmp_path, struct.pack("<8H", 2, 9, 0, 0, 2, 9, 0, 0), 300, 16)
    empty = (
        struct.pack("<3H", 0, 1, 7) + struct.pack("<2H", 0, 0) * 40_000 + struct.pack("<4H", 2, 40_000, 6, 0) * 20_000
    )
    start = time.process_time()
    with pytest.raises(DataError, match=r"^a.dcm: "):  # eight hundred million segments of no entries
        _segmented(tmp_path, empty, 300, 16)
    assert time.process_time() - start < 5
    assert len(_segmented(tmp_path, struct.pack("<5H", 0, 1, 7, 1, 65_535) + struct.pack("<H", 9), 300, 16)) == 300
