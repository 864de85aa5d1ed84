"""Who a patient is: one answer for headers, tables and arrays."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.wire.identity import EncoderIdentity
from embeddings.pipeline import Listing
from embeddings.readers.findings import LabelForm
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.patients import patient_identifier, patient_number
from embeddings.readers.ready import ReadyNames, import_ready
from embeddings.store.file import read_store
from tests.embeddings.readers.dicom_files import dataset_of, save

NOBODY = ["", "  ", "\0\0", "ANONYMOUS", "Anonymized", "unknown", "UNKNOWN ", "None", "null", "NaN", "n/a", "N.A."]
NOBODY += ["-1", "-1.0", "---", "???", "XXXX", "de-identified", "Anonymous^Patient", "not known"]


@pytest.mark.parametrize("stated", NOBODY)
def test_placeholders_name_nobody(stated: str) -> None:
    assert patient_identifier(stated) == ""


@pytest.mark.parametrize(
    "stated", ["0", "1", "007", "A-1", "X", "XX", "Nana", "1.5", "1.0.0", ".0", "unknown7", "Müller", "患者"]
)
def test_identifiers_stay_as_they_are(stated: str) -> None:
    assert patient_identifier(stated) == stated


@pytest.mark.parametrize(("stated", "one"), [("12.0", "12"), (" 007.00 ", "007"), ("0.0", "0"), ("-2.0", "-2")])
def test_a_whole_number_with_a_point_is_the_same_patient(stated: str, one: str) -> None:
    assert patient_identifier(stated) == patient_identifier(one) == one


@given(stated=st.text(max_size=12), before=st.text(" \0\t\ufeff", max_size=3), after=st.text(" \0\u200b", max_size=3))
def test_ends_and_accents_make_no_other_patient(stated: str, before: str, after: str) -> None:
    one = patient_identifier(stated)
    assert patient_identifier(before + unicodedata.normalize("NFD", stated) + after) == one
    assert patient_identifier(one) == one
    assert isinstance(patient_number(bytes(32), one), int)


@given(stated=st.text(st.characters(), max_size=9))
def test_any_text_has_a_number(stated: str) -> None:
    assert isinstance(patient_number(bytes(32), patient_identifier(stated)), int)


def _scans(folder: Path, stated: list[str]) -> Path:
    (folder / "a").mkdir(parents=True)
    for number, patient in enumerate(stated):
        dataset = dataset_of(np.arange(12).reshape(3, 4), PatientID=patient, SeriesInstanceUID=f"1.2.{number}")
        save(folder / "a" / f"{number}.dcm", dataset)
    return folder


def _patients(listing: Listing) -> list[str | None]:
    return [item.patient for item in listing.items]


def test_header_identifiers_are_stripped_and_placeholders_rejected_by_row(tmp_path: Path) -> None:
    stated = ["00123", "  00123", "00123 ", "00124", " 00124", "ANONYMOUS", ""]
    listing = list_folder(_scans(tmp_path / "scans", stated), None, FolderOptions())
    assert _patients(listing) == ["00123"] * 3 + ["00124"] * 2
    assert [source for source, _ in listing.rejected] == ["a/5.dcm", "a/6.dcm"]
    assert "'ANONYMOUS' is stated as the patient, which names nobody" in listing.rejected[0][1]
    assert "not known" in listing.rejected[1][1]


def test_placeholders_alone_are_no_patients_and_said_so(tmp_path: Path) -> None:
    scans = _scans(tmp_path / "scans", ["UNKNOWN", "UNKNOWN"])
    listing = list_folder(scans, None, FolderOptions())
    assert _patients(listing) == [None, None]
    assert listing.remarks == (
        "no patient is known: 'UNKNOWN' is stated as the patient, which names nobody; give a patient column, or use "
        "--no-patients (2 images)",
    )
    assert list_folder(scans, None, FolderOptions(patients=False)).remarks == ()


def test_a_table_says_who_whatever_the_header_says(tmp_path: Path) -> None:
    scans = _scans(tmp_path / "scans", ["P1", "P2", "P3", "P4"])
    rows = ["a/0.dcm,x, P9 ", "a/1.dcm,x,P9", "a/2.dcm,x,n/a", "a/3.dcm,x,"]
    (tmp_path / "l.csv").write_text("\n".join(["path,label,patient", *rows]))
    listing = list_folder(scans, tmp_path / "l.csv", FolderOptions())
    assert _patients(listing) == ["P9", "P9"]
    reasons = dict(listing.rejected)
    assert reasons["a/2.dcm"] == "the label file has 'n/a', which names nobody, as the patient in line 4"
    assert reasons["a/3.dcm"] == "the label file has nothing as the patient in line 5"
    without = list_folder(scans, tmp_path / "l.csv", FolderOptions(patients=False))
    assert (_patients(without), without.rejected) == ([None] * 4, ())


@pytest.mark.parametrize(
    ("stated", "units", "kept"),
    [
        (np.asarray(["A1", "A1 ", " A1", "B2", "B2", "B2"]), 2, 6),
        (np.asarray(["A1", "", "NaN", "unknown", "B2", " "]), 2, 2),
        (np.asarray(["Mü".encode(), "Mu\u0308".encode(), b"n/a", b"B2", b"B2", b"B2"]), 2, 5),
        (np.asarray([-1, -1, 0, 0, 7, 7]), 2, 4),
    ],
)
def test_arrays_of_patients_have_the_same_units(tmp_path: Path, stated: np.ndarray, units: int, kept: int) -> None:
    np.savez(tmp_path / "r.npz", embeddings=np.ones((6, 3), np.float32), labels=np.zeros(6, int), who=stated)
    declared = EncoderIdentity("e", "1", 0, "none", "declared", "float32", ())
    names = ReadyNames(patients="who")
    rows, rejected = import_ready(
        tmp_path / "r.npz", tmp_path / "o.parquet", names, LabelForm(), declared, bytes(32), "float32"
    )
    assert (rows, len(rejected)) == (kept, 6 - kept)
    assert all(reason.endswith("names no patient") for _, reason in rejected)
    groups = read_store(tmp_path / "o.parquet").groups
    assert groups is not None
    assert np.unique(groups).size == units


def test_few_known_patients_are_refused_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="known for 1 of 3 images"):
        list_folder(_scans(tmp_path / "scans", ["P1", "unknown", "unknown"]), None, FolderOptions())
