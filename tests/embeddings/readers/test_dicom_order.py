"""The middle slice of a series, by where slices lie, by their numbers, or by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.readers.dicom_order import Slice, in_order, natural
from embeddings.readers.folders import FolderOptions, list_folder
from tests.embeddings.readers.dicom_files import Dataset, dataset_of, save

AXIAL = [1, 0, 0, 0, 1, 0]
SAGITTAL = [0, 1, 0, 0, 0, -1]


def _series(folder: Path, headers: list[dict[str, Any]], names: list[str]) -> list[str]:
    """What is taken of a series of files with these headers."""
    (folder / "a").mkdir(parents=True)
    for header, name in zip(headers, names, strict=True):
        dataset = dataset_of(np.arange(12).reshape(3, 4), SeriesInstanceUID="1.2.3", **header)
        save(folder / "a" / name, dataset)
    return [item.source for item in list_folder(folder, None, FolderOptions(slices="middle")).items]


def _names(count: int) -> list[str]:
    return [f"IM{number}" for number in range(1, count + 1)]


def test_eleven_slices_without_numbers_are_ordered_by_position(tmp_path: Path) -> None:
    headers = [{"ImagePositionPatient": [0, 0, 5 * n], "ImageOrientationPatient": AXIAL} for n in range(1, 12)]
    assert _series(tmp_path / "scans", headers, _names(11)) == ["a/IM6"]


def test_positions_count_along_the_normal_and_before_numbers(tmp_path: Path) -> None:
    """Sagittal slices: x decides, though y and z and the instance numbers say otherwise."""
    places = [(30, -5, 1), (10, 9, 2), (20, 400, 3), (50, 7, 4), (40, -300, 5)]
    headers = [
        {"ImagePositionPatient": list(place), "ImageOrientationPatient": SAGITTAL, "InstanceNumber": number}
        for number, place in enumerate(places)
    ]
    assert _series(tmp_path / "scans", headers, _names(5)) == ["a/IM1"]


@pytest.mark.parametrize("broken", [{}, {"ImagePositionPatient": [1, 2, 3]}, {"ImageOrientationPatient": SAGITTAL}])
def test_numbers_count_where_a_position_is_missing_or_planes_differ(tmp_path: Path, broken: dict[str, Any]) -> None:
    headers: list[dict[str, Any]] = [
        {"ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": AXIAL, "InstanceNumber": number}
        for z, number in ((1, 9), (2, 8), (3, 10), (4, 100), (5, 11))
    ]
    if broken:
        headers[0] |= {"ImagePositionPatient": [0, 0, 1]} | broken
        if "ImageOrientationPatient" not in broken:
            headers[0].pop("ImageOrientationPatient")
    else:
        headers[0].pop("ImagePositionPatient")
    assert _series(tmp_path / "scans", headers, _names(5)) == ["a/IM3"]


def test_locations_count_where_positions_are_missing(tmp_path: Path) -> None:
    headers = [{"SliceLocation": place, "InstanceNumber": number} for number, place in enumerate((9.5, -3, 10, 100, 8))]
    assert _series(tmp_path / "scans", headers, _names(5)) == ["a/IM1"]


@pytest.mark.parametrize("header", [{}, {"InstanceNumber": 1}])
def test_names_count_as_numbers_where_nothing_else_is_known(tmp_path: Path, header: dict[str, Any]) -> None:
    assert _series(tmp_path / "scans", [header] * 11, _names(11)) == ["a/IM6"]


def test_a_number_that_is_none_costs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "scans" / "a"
    path.mkdir(parents=True)
    save(path / "x.dcm", dataset_of(np.arange(12).reshape(3, 4), InstanceNumber=12345678))
    raw = (path / "x.dcm").read_bytes()
    assert b"12345678" in raw
    (path / "x.dcm").write_bytes(raw.replace(b"12345678", b"1.5 mm  "))
    listing = list_folder(tmp_path / "scans", None, FolderOptions(slices="middle"))
    assert (len(listing.items), listing.rejected) == (1, ())


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


@pytest.mark.parametrize("shared", [True, False])
def test_frames_are_ordered_by_their_planes(tmp_path: Path, shared: bool) -> None:
    heights = [4, 0, 3, 1, 2]
    dataset = dataset_of(np.arange(60).reshape(5, 3, 4))
    plane = _item(PlaneOrientationSequence=[_item(ImageOrientationPatient=AXIAL)])
    groups = [_item(PlanePositionSequence=[_item(ImagePositionPatient=[9, 9, height])]) for height in heights]
    if shared:
        dataset.SharedFunctionalGroupsSequence = [plane]
    else:
        for group in groups:
            group.PlaneOrientationSequence = plane.PlaneOrientationSequence
    dataset.PerFrameFunctionalGroupsSequence = groups
    (tmp_path / "scans" / "a").mkdir(parents=True)
    save(tmp_path / "scans" / "a" / "x.dcm", dataset)
    options = FolderOptions(slices="middle")
    assert [item.source for item in list_folder(tmp_path / "scans", None, options).items] == ["a/x.dcm#4"]
    dataset.PerFrameFunctionalGroupsSequence = groups[:3]
    save(tmp_path / "scans" / "a" / "x.dcm", dataset)
    assert [item.source for item in list_folder(tmp_path / "scans", None, options).items] == ["a/x.dcm#2"]


@given(
    heights=st.lists(st.integers(-500, 500), min_size=1, max_size=30, unique=True),
    angle=st.floats(-3, 3),
    shift=st.floats(-300, 300),
)
def test_slices_are_ordered_along_any_normal(heights: list[int], angle: float, shift: float) -> None:
    """Planes turned about the x axis: the normal is (0, -sin, cos), and a place in the plane says nothing."""
    row, column = np.asarray([1.0, 0, 0]), np.asarray([0.0, np.cos(angle), np.sin(angle)])
    normal = np.asarray([0.0, -np.sin(angle), np.cos(angle)])
    slices = [
        Slice(tuple((height * normal + shift * place * row + place * column).tolist()), (*row, *column), None, 7)
        for place, height in enumerate(heights)
    ]
    order = in_order(slices, ["x"] * len(heights))
    assert [heights[place] for place in order] == sorted(heights)


@given(names=st.lists(st.text("IM0123456789-\u0663", max_size=9), min_size=1))
def test_any_names_can_be_ordered(names: list[str]) -> None:
    order = in_order([Slice()] * len(names), names)
    assert sorted(order) == list(range(len(names)))
    assert sorted(["IM10", "IM2", "IM1"], key=natural) == ["IM1", "IM2", "IM10"]


def test_one_series_number_of_two_patients_is_two_series(tmp_path: Path) -> None:
    headers = [{"PatientID": patient, "InstanceNumber": n} for patient in ("A", " A", "B") for n in range(3)]
    names = ["A0", "A1", "A2", "A3", "A4", "A5", "B0", "B1", "B2"]
    assert _series(tmp_path / "scans", headers, names) == ["a/A4", "a/B1"]
