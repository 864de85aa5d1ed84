"""Classes are those found, in arrays as in tables; what may be a slip is remarked upon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from common.wire.identity import EncoderIdentity
from embeddings.readers.arrays import list_medmnist
from embeddings.readers.classes import array_classes, array_texts, class_lines, class_list
from embeddings.readers.findings import LabelForm
from embeddings.readers.patients import patient_number
from embeddings.readers.ready import ReadyNames, import_ready, read_ready
from embeddings.store.file import read_store

SALT = bytes(range(32))
DECLARED = EncoderIdentity("sscd", "1", 0, "288 px", "declared", "float32", ())


def _archive(path: Path, labels: Any, **more: Any) -> Path:
    labels = np.asarray(labels)
    rows = np.random.default_rng(0).standard_normal((len(labels), 4)).astype(np.float32)
    np.savez(path, embeddings=rows, labels=labels, **{name: np.asarray(values) for name, values in more.items()})
    return path


def _read(tmp_path: Path, labels: Any, classes: list[str] | None = None, **more: Any) -> tuple[Any, ...]:
    names = ReadyNames(patients="patients" if "patients" in more else None)
    ready = read_ready(
        _archive(tmp_path / "r.npz", labels, **more),
        tmp_path / "work",
        names,
        LabelForm(classes=None if classes is None else tuple(classes)),
    )
    return ready.class_names, ready.labels.tolist(), [reason.split(";")[0] for _, reason in ready.rejected]


# what lies in the archive, the list agreed, the archive's own list -> names, class of each row, rejected
CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "codes of eight digits": ([80146002, 22298006, 80146002], None, None, (("22298006", "80146002"), [1, 0, 1], [])),
    "codes, listed": ([80146002, 22298006], ["80146002", "22298006"], None, (("80146002", "22298006"), [0, 1], [])),
    "codes of ICD-O": ([8140, 8070], None, None, (("8070", "8140"), [1, 0], [])),
    "counted from one": ([1, 3, 2], None, None, (("1", "2", "3"), [0, 2, 1], [])),
    "counted from one, listed": ([1, 3, 2], ["3", "2", "1"], None, (("3", "2", "1"), [2, 0, 1], [])),
    "counted from zero": ([1, 0, 2], None, None, (("0", "1", "2"), [1, 0, 2], [])),
    "one class is missing here": ([0, 2], None, None, (("0", "2"), [0, 1], [])),
    "places in a list of names": ([1, 0, 2], ["a", "b"], None, (("a", "b"), [1, 0, -1], ["unknown label 2"])),
    "places in the archive's list": ([1, 0], None, ["8140", "8070"], (("8140", "8070"), [1, 0], [])),
    "a list agreed before the archive's": ([1, 0], ["x", "y"], ["a", "b"], (("x", "y"), [1, 0], [])),
    "a list agreed that orders the archive's": ([1, 0, 2], ["c", "a"], ["a", "b", "c"], (
        ("c", "a"), [-1, 1, 0], ["unknown label 1"]
    )),
    "below zero": ([-1, 0, 1], None, None, (("0", "1"), [-1, 0, 1], ["unknown label -1"])),
    "below zero, listed": ([-1, 1], ["-1", "1"], None, (("-1", "1"), [0, 1], [])),
    "the largest of 64 bits": (np.asarray([2**64 - 1, 0], np.uint64), None, None, (("0", str(2**64 - 1)), [1, 0], [])),
    "beyond int64 in a list of names": (
        np.asarray([2**63 + 1, 0], np.uint64), ["a", "b"], None, (("a", "b"), [-1, 0], [f"unknown label {2**63 + 1}"])
    ),
    "texts": (["b", "a"], None, None, (("a", "b"), [1, 0], [])),
    "padded texts": (["b ", " b", "a"], None, None, (("a", "b"), [1, 1, 0], [])),
    "an empty text": (["", "a", "  "], None, None, (("a",), [-1, 0, -1], ["no label", "no label"])),
    "numbers as texts": (["10", "9"], None, None, (("9", "10"), [1, 0], [])),
    "accents in two spellings": (["O\u0308dem", "\u00d6dem"], None, None, (("\u00d6dem",), [0, 0], [])),
    "bytes in ASCII": (np.asarray([b"b", b"a"]), None, None, (("a", "b"), [1, 0], [])),
    "bytes in UTF-8": (np.asarray([b"gut", "bös".encode()]), None, None, (("bös", "gut"), [1, 0], [])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_read_ready_takes_the_classes_found_or_agreed(tmp_path: Path, name: str) -> None:
    labels, classes, own, wanted = CASES[name]
    assert _read(tmp_path, labels, classes, **({} if own is None else {"class_names": own})) == wanted


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.asarray([b"b\xf6s", b"gut"]), "labels.*UTF-8"),
        (np.asarray(["\ud800", "a"]), "labels.*UTF-8"),
        (np.asarray([0.0, 1.0]), "whole numbers or texts"),
        (np.asarray([True, False]), "whole numbers or texts"),
        (np.asarray([[0, 1], [1, 0]]), "whole numbers or texts"),
        (np.arange(10_001), "found 10,001 different ones, expected at most 10,000"),
    ],
)
def test_read_ready_refuses_labels_that_are_none(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _read(tmp_path, labels)


@pytest.mark.parametrize("where", ["agreed", "own"])
def test_read_ready_refuses_places_that_count_from_one(tmp_path: Path, where: str) -> None:
    names = ["a", "b", "c"]
    with pytest.raises(DataError, match="labels: found 1 to 3 beside a list of 3 names"):
        _read(
            tmp_path,
            [1, 3, 2],
            names if where == "agreed" else None,
            **({"class_names": names} if where == "own" else {}),
        )


def test_read_ready_refuses_code_points_that_are_none(tmp_path: Path) -> None:
    labels = np.frombuffer(b"\xff\xff\xff\x7f" * 2, dtype="<U1")
    with pytest.raises(DataError, match="labels"):
        _read(tmp_path, labels)


def test_import_ready_rejects_rows_without_a_patient_and_joins_padded_ones(tmp_path: Path) -> None:
    path = _archive(tmp_path / "r.npz", ["a"] * 6, patients=["A1", "A1 ", " A1", "", "  ", "B2"])
    names = ReadyNames(patients="patients")
    rows, rejected = import_ready(path, tmp_path / "o.parquet", names, LabelForm(), DECLARED, SALT, "float32")
    assert rows == 4
    assert [source for source, _ in rejected] == ["r.npz[3]", "r.npz[4]"]
    groups = read_store(tmp_path / "o.parquet").groups
    assert groups is not None
    assert groups.tolist() == [patient_number(SALT, name) for name in ("A1", "A1", "A1", "B2")]


def test_import_ready_says_why_no_row_is_left(tmp_path: Path) -> None:
    path = _archive(tmp_path / "r.npz", [7, 8])
    with pytest.raises(DataError, match=r"none of 2 rows can be used; the first: r.npz\[0\]: unknown label 7"):
        import_ready(
            path, tmp_path / "o.parquet", ReadyNames(), LabelForm(classes=("a", "b")), DECLARED, SALT, "float32"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


@pytest.mark.parametrize("columns", [("x", "x"), ("label",), ("key",)])
def test_read_ready_refuses_columns_that_a_store_has(tmp_path: Path, columns: tuple[str, ...]) -> None:
    path = _archive(tmp_path / "r.npz", ["a"], x=["1"], label=["a"], key=["k"])
    with pytest.raises(ConfigError, match="different names"):
        read_ready(path, tmp_path / "work", ReadyNames(columns=columns), LabelForm())


def test_list_medmnist_takes_the_numbers_found(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for split, labels in (("train", [[3], [1]]), ("val", [[2]]), ("test", [])):
        arrays[f"{split}_images"] = np.zeros((len(labels), 4, 4), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.asarray(labels, dtype=np.uint64).reshape(-1, 1)
    np.savez(tmp_path / "m.npz", **arrays)
    listing = list_medmnist(tmp_path / "m.npz", tmp_path / "work", LabelForm())
    assert listing.class_names == ("1", "2", "3")
    assert [item.label for item in listing.items] == [2, 0, 1]
    agreed = list_medmnist(tmp_path / "m.npz", tmp_path / "work", LabelForm(classes=("2", "3")))
    assert [item.label for item in agreed.items] == [1, 0]
    assert agreed.rejected == (("m.npz[train_images][1]", "unknown label 1; expected 2, 3"),)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=30), st.sampled_from(["i8", "u8", "U20", "S20"]))
def test_array_classes_are_those_of_a_table(labels: list[int], kind: str) -> None:
    texts = [str(label) for label in labels]
    array = np.asarray(labels if kind in ("i8", "u8") else texts, dtype=kind)
    names, (numbers,), _ = array_classes([array_texts("x", array)], None)
    assert names == tuple(str(value) for value in sorted(set(labels))) == class_list(None, texts)
    assert [names[number] for number in numbers] == texts


@given(st.lists(st.text(alphabet="ab O\u0308\u00d6\ufeff", max_size=4), min_size=1, max_size=12))
def test_array_classes_spell_texts_as_tables_do(labels: list[str]) -> None:
    import unicodedata

    wanted = [unicodedata.normalize("NFC", text).strip(" \ufeff") for text in labels]
    names, (numbers,), _ = array_classes([array_texts("x", np.asarray(labels, dtype=np.str_))], None)
    assert names == tuple(sorted(set(wanted) - {""}))
    assert [names[number] if number >= 0 else "" for number in numbers] == wanted


# names -> pairs of names that a remark joins, and names that a remark calls missing
REMARKS: dict[tuple[str, ...], tuple[list[tuple[str, ...]], list[str]]] = {
    ("benign", "malignant"): ([], []),
    ("0", "1", "10"): ([], []),
    ("0", "1", "1.0"): ([("1", "1.0")], []),
    ("01", "1"): ([], []),
    ("1.5", "1.50"): ([], []),
    ("BENIGN", "Benign", "benign", "x"): ([("BENIGN", "Benign", "benign")], []),
    ("STRASSE", "straße"): ([("STRASSE", "straße")], []),
    ("in situ", "in  situ"): ([("in situ", "in  situ")], []),
    ("NA", "NaN", "a", "nan"): ([("NaN", "nan")], ["NA", "NaN", "nan"]),
    ("None", "a"): ([], ["None"]),
    ("-", "a", "none"): ([], ["-", "none"]),
    ("-1", "1", "<NA>", "N/A", "?"): ([], ["-1", "<NA>", "N/A", "?"]),
    ("nanny", "a-b", "nonesuch"): ([], []),
}


@pytest.mark.parametrize("names", REMARKS)
def test_class_lines_remark_on_names_that_may_be_slips(names: tuple[str, ...]) -> None:
    alike, missing = REMARKS[names]
    counts, *remarks = class_lines(names, range(1, len(names) + 1))
    assert counts.startswith(f"{len(names)} classes: {names[0]} 1")
    assert len(remarks) == len(alike) + len(missing)
    for one in alike:
        assert sum(all(repr(name) in line for name in one) and "differ only" in line for line in remarks) == 1
    for name in missing:
        assert sum(repr(name) in line and "missing label" in line for line in remarks) == 1


def test_class_lines_stay_short() -> None:
    lines = class_lines([f"class {number}" for number in range(8141)], [1000] * 8141)
    assert len(lines) == 1
    assert lines[0].endswith("class 19 1,000, ... (8,121 more)")
