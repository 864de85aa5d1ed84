"""Findings of a record, present, absent or unknown, in each form in which a site has them; and grades."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import ConfigError, DataError
from common.wire.identity import EncoderIdentity
from embeddings.pipeline import Listing
from embeddings.readers.arrays import list_medmnist
from embeddings.readers.findings import CELLS, LabelForm, cells_of, label_form, names_of
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.ready import ReadyNames, import_ready
from embeddings.store.file import read_store
from embeddings.store.sets import EmbeddingSet

DECLARED = EncoderIdentity("enc", "r1", 0, "none", "declared, not measured", "float32", ())
MANY = LabelForm("multilabel")
GRADES = LabelForm("ordinal")
NAMES = ("effusion", "mass")
ROWS = [[1, 0], [0, -1], [-1, -1], [1, 1]]


def _listed(folder: Path, table: str, form: LabelForm) -> Listing:
    for number in range(table.count("\n") - 1):
        Image.new("L", (8, 8), 10 * number + 1).save(folder / f"{number}.png")
    labels = folder / "labels.csv"
    labels.write_text(table, encoding="utf-8")
    return list_folder(folder, labels, FolderOptions(form=form))


def _imported(path: Path, form: LabelForm, **names: Any) -> tuple[EmbeddingSet, dict[str, str]]:
    out = path.with_name("out.parquet")
    _, rejected = import_ready(path, out, ReadyNames(**names), form, DECLARED, bytes(32), "float32")
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([path.name, out.name])
    return read_store(out), dict(rejected)


def _same(data: EmbeddingSet, rows: list[list[int]] = ROWS, names: tuple[str, ...] = NAMES) -> None:
    assert (data.metadata.task, data.metadata.class_names) == ("multilabel", names)
    assert data.labels.tolist() == rows
    assert data.metadata.class_counts == tuple((np.asarray(rows) == 1).sum(axis=0))


def test_table_with_a_column_for_each_finding(tmp_path: Path) -> None:
    table = (
        "path,effusion,note,mass\n0.png,1,x,0\n1.png,0.0,x,u\n2.png,,x,-1\n3.png,Yes,x,present\n4.png,1,x,2\n"
        "5.png,none,x,0\n"
    )
    listing = _listed(tmp_path, table, LabelForm("multilabel", findings=NAMES))
    assert (listing.task, listing.class_names) == ("multilabel", NAMES)
    assert [list(item.label) for item in listing.items if isinstance(item.label, tuple)] == ROWS
    expected = "expected 1 (present), 0 (absent), or nothing, -1 or u (unknown), in line"
    assert dict(listing.rejected) == {
        "4.png": f"mass is '2'; {expected} 6",
        "5.png": f"effusion is 'none'; {expected} 7",
    }


def test_columns_of_findings_may_have_the_names_agreed(tmp_path: Path) -> None:
    form = LabelForm("multilabel", ("Effusion", "Mass"), ("e", "m"))
    listing = _listed(tmp_path, "path,m,e\n0.png,0,1\n", form)
    assert (listing.class_names, listing.items[0].label) == (("Effusion", "Mass"), (1, 0))


def test_two_rows_of_a_picture_with_other_findings_reject_it(tmp_path: Path) -> None:
    listing = _listed(
        tmp_path, "path,mass\n0.png,1\n0.png,\n1.png,0\n1.png,0\n", LabelForm("multilabel", None, ("mass",))
    )
    assert [item.source for item in listing.items] == ["1.png"]
    assert "two rows that differ" in dict(listing.rejected)["0.png"]


def test_table_with_one_column_of_names(tmp_path: Path) -> None:
    table = (
        "path,label\n0.png,Effusion\n1.png,No Finding|Mass?\n2.png,Mass? | Effusion?\n3.png,Mass|Effusion\n"
        "4.png,no finding\n5.png,Mass|No Finding\n6.png,\n7.png,|\n8.png,Mass|Effusion|Mass?\n9.png,Mass?|Mass\n"
    )
    with pytest.raises(DataError, match=r"does not depend on who has one: .* Found in the labels: Effusion, Mass$"):
        _listed(tmp_path, table, MANY)
    listing = _listed(tmp_path, table, LabelForm("multilabel", ("Effusion", "Mass")))
    assert listing.class_names == ("Effusion", "Mass")
    assert [item.label for item in listing.items] == [(1, 0), (0, -1), (-1, -1), (1, 1), (0, 0)]
    assert dict(listing.rejected) == {
        "5.png": "'Mass|No Finding' names a finding beside No Finding",
        "6.png": "the label file has no label in line 8",
        "7.png": "no finding in '|'; where there is none expected No Finding",
        "8.png": "'Mass|Effusion|Mass?' names Mass as present and as unknown",
        "9.png": "'Mass?|Mass' names Mass as present and as unknown",
    }


def test_names_outside_the_agreed_list_reject_their_row(tmp_path: Path) -> None:
    form = LabelForm("multilabel", ("Mass", "No Finding"), (), ";")
    listing = _listed(tmp_path, "path,label\n0.png,Mass;Hernia\n1.png,No Finding\n2.png,Mass\n", form)
    assert [item.label for item in listing.items] == [(0, 1), (1, 0)]  # listed, it is a finding like others
    assert dict(listing.rejected) == {"0.png": "unknown finding 'Hernia'; expected Mass, No Finding, or No Finding"}


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.float32, np.str_])
def test_archive_with_a_row_of_findings_for_each_record(tmp_path: Path, kind: type) -> None:
    labels = np.asarray([*ROWS, [0, 3]]).astype(kind)
    if kind is np.float32:
        labels[labels == -1] = np.nan
    np.savez(
        tmp_path / "r.npz", embeddings=np.eye(5, 6, dtype=np.float32), labels=labels, class_names=np.asarray(NAMES)
    )
    data, rejected = _imported(tmp_path / "r.npz", MANY)
    _same(data)
    assert list(rejected) == ["r.npz[4]"]
    assert rejected["r.npz[4]"].startswith("mass is '3")


def test_archive_with_an_array_for_each_finding_or_one_of_names(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "r.npz",
        embeddings=np.eye(4, 6, dtype=np.float32),
        effusion=np.asarray([True, False, True, True]),
        mass=np.asarray(["0", "u", "", "1"]),
        labels=np.asarray(["effusion", "mass?|no finding", "effusion|mass?", "mass|effusion"]),
    )
    rows = [[1, 0], [0, -1], [1, -1], [1, 1]]
    _same(_imported(tmp_path / "r.npz", LabelForm("multilabel", None, NAMES))[0], rows)
    _same(_imported(tmp_path / "r.npz", LabelForm("multilabel", NAMES))[0], rows)


@pytest.mark.parametrize(
    ("labels", "form", "names", "message"),
    [
        (np.zeros((3, 2), np.int8), MANY, None, "expected the names of 2 findings"),
        (np.zeros((3, 2), np.int8), LabelForm("multilabel", ("a",)), None, "expected the names of 2 findings"),
        (np.zeros((3, 2), np.int8), LabelForm(), None, "with --task multilabel also a row of findings"),
        (np.zeros((2, 2), np.int8), MANY, NAMES, "expected labels as 3 whole numbers"),
        (np.zeros((3, 2), np.complex64), MANY, NAMES, "expected labels as 3 whole numbers"),
        (np.zeros((3, 0), np.int8), MANY, NAMES, "expected labels as 3 whole numbers"),
    ],
)
def test_archives_of_findings_that_are_none(
    tmp_path: Path, labels: np.ndarray, form: LabelForm, names: tuple[str, ...] | None, message: str
) -> None:
    more = {} if names is None else {"class_names": np.asarray(names)}
    np.savez(tmp_path / "r.npz", embeddings=np.eye(3, dtype=np.float32), labels=labels, **more)
    with pytest.raises(DataError, match=message):
        _imported(tmp_path / "r.npz", form)
    assert [file.name for file in tmp_path.iterdir()] == ["r.npz"]


LISTS = {
    "fixed lists of int8": pa.array(ROWS, pa.list_(pa.int8(), 2)),
    "lists with gaps": pa.array([[1, 0], [0, None], None, [1, 1]], pa.list_(pa.int16())),
    "lists of floats": pa.array([[1.0, 0.0], [0.0, None], [float("nan"), None], [1.0, 1.0]], pa.list_(pa.float64())),
    "large lists of booleans": pa.array([[True, False], [False, None], None, [True, True]], pa.large_list(pa.bool_())),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 3), pa.list_(pa.float64()), pa.list_(pa.float16())])
def test_parquet_with_a_list_of_findings(tmp_path: Path, name: str, kind: Any) -> None:
    embeddings = np.arange(12, dtype=np.float16).reshape(4, 3)
    who = pa.array(["p1", "p1", "p2", "p2"]).dictionary_encode()
    columns = {"embeddings": pa.array(list(embeddings), kind), "labels": LISTS[name], "who": who}
    pq.write_table(pa.table(columns), tmp_path / "r.parquet")
    data, rejected = _imported(tmp_path / "r.parquet", LabelForm("multilabel", NAMES), patients="who")
    _same(data)
    np.testing.assert_array_equal(data.embeddings, embeddings)
    assert len(set(np.asarray(data.groups).tolist())) == 2
    assert rejected == {}


def test_parquet_with_a_column_for_each_finding_or_one_of_names(tmp_path: Path) -> None:
    columns = {
        "embeddings": pa.array(np.eye(5, 3).tolist()),
        "effusion": pa.array([1, 0, None, 1, 0]),
        "mass": pa.array(["0", None, "u", "yes", "maybe"]),
        "labels": pa.array(
            ["effusion", "mass?|No Finding", "effusion?|mass?", "mass|effusion", None], pa.large_string()
        ),
        "who": pa.array([1, 1, 2, None, 3]),
        "where": pa.array(["a", None, "b", "c", "d"]),
    }
    columns["embeddings"] = pa.array([*np.eye(5, 3)[:3].tolist(), [0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    pq.write_table(pa.table(columns), tmp_path / "r.parquet", row_group_size=2)
    more = {"patients": "who", "columns": ("where",)}
    data, rejected = _imported(tmp_path / "r.parquet", LabelForm("multilabel", None, NAMES), **more)
    _same(data, ROWS[:3])
    assert data.columns["where"].tolist() == ["a", "", "b"]
    assert rejected["r.parquet[3]"] == "'-1' names no patient"
    assert rejected["r.parquet[4]"].startswith("mass is 'maybe'")
    data, rejected = _imported(tmp_path / "r.parquet", LabelForm("multilabel", NAMES))
    _same(data)
    assert rejected == {"r.parquet[4]": "no finding in ''; where there is none expected No Finding"}


def test_parquet_of_classes_and_of_empty_embeddings(tmp_path: Path) -> None:
    columns = {
        "embeddings": pa.array([[1.0, 2.0], None, [3.0, None], [5.0, 6.0]]),
        "labels": pa.array(["b", "a", "a", "a"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "r.parquet")
    data, rejected = _imported(tmp_path / "r.parquet", LabelForm())
    assert data.labels.tolist() == [1, 0]
    assert list(rejected) == ["r.parquet[1]", "r.parquet[2]"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"embeddings": pa.array([[1.0], [1.0, 2.0]])}, "expected lists of 1 numbers"),
        ({"embeddings": pa.array([[1.0], []])}, "expected lists of 1 numbers"),
        ({"embeddings": pa.array([[], []], pa.list_(pa.float32()))}, "expected lists of 1 to"),
        ({"embeddings": pa.array([None, None], pa.list_(pa.float32()))}, "holds no list"),
        ({"embeddings": pa.array([1.0, 2.0])}, r"expected embeddings as \(n, d\) floats"),
        ({"embeddings": pa.array([[1], [2]])}, r"expected embeddings as \(n, d\) floats"),
        ({"embeddings": pa.array([{"x": 1.0}] * 2)}, "as numbers, texts or lists of numbers"),
        ({"other": pa.array([1, 2])}, "expected one column called embeddings; found other"),
        ({"embeddings": pa.array([[1.0], [2.0]]), "labels": pa.array([2**63, 1], pa.uint64())}, "can't be read"),
    ],
)
def test_parquet_files_that_are_none(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=message):
        _imported(tmp_path / "r.parquet", LabelForm())
    assert [file.name for file in tmp_path.iterdir()] == ["r.parquet"]


def test_damaged_parquet_files_are_refused_in_one_line(tmp_path: Path) -> None:
    columns = {"embeddings": pa.array(np.eye(3).tolist()), "labels": pa.array([0, 1, 1])}
    pq.write_table(pa.table(columns), tmp_path / "whole.parquet")
    raw, rng = (tmp_path / "whole.parquet").read_bytes(), np.random.default_rng(7)
    (tmp_path / "whole.parquet").unlink()
    refused = []
    for _ in range(150):
        damaged = bytearray(raw)
        for place in rng.integers(0, len(raw), 4):
            damaged[place] = rng.integers(256)
        (tmp_path / "r.parquet").write_bytes(damaged)
        try:
            import_ready(
                tmp_path / "r.parquet",
                tmp_path / "o.parquet",
                ReadyNames(),
                LabelForm(),
                DECLARED,
                bytes(32),
                "float32",
            )
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert not any("\n" in message for message in refused)


def test_parquet_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path: Path) -> None:
    kind = pa.list_(pa.float32(), 64)
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2**25, np.float32)), type=kind)
    columns = {"embeddings": zeros, "labels": pa.array(np.zeros(2**19, np.int8))}
    pq.write_table(pa.table(columns), tmp_path / "r.parquet", compression="zstd")
    with pytest.raises(DataError, match="decompression bomb"):
        _imported(tmp_path / "r.parquet", LabelForm())


def test_medmnist_with_findings(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for split, labels in (("train", [[1, 0], [0, 1], [0, 2]]), ("val", [[0, 0]]), ("test", np.zeros((0, 2)))):
        arrays[f"{split}_images"] = np.zeros((len(labels), 4, 4), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.asarray(labels, dtype=np.uint8)
    np.savez(tmp_path / "m.npz", **arrays)
    listing = list_medmnist(tmp_path / "m.npz", tmp_path / "work", LabelForm("multilabel", NAMES))
    assert (listing.task, listing.class_names) == ("multilabel", NAMES)
    assert [item.label for item in listing.items] == [(1, 0), (0, 1), (0, 0)]
    assert [source for source, _ in listing.rejected] == ["m.npz[train_images][2]"]
    with pytest.raises(DataError, match="several with --task multilabel"):
        list_medmnist(tmp_path / "m.npz", tmp_path / "other", LabelForm())


def test_grades_keep_their_order(tmp_path: Path) -> None:
    listing = _listed(tmp_path, "path,label\n0.png,2\n1.png,10\n", LabelForm("ordinal", tuple("0 1 2 10".split())))  # noqa: SIM905
    assert [item.label for item in listing.items] == [2, 3]
    words = LabelForm("ordinal", ("none", "mild", "severe"))
    listing = _listed(tmp_path, "path,label\n0.png,severe\n1.png,none\n", words)
    assert (listing.task, [item.label for item in listing.items]) == ("ordinal", [2, 0])
    np.savez(tmp_path / "r.npz", embeddings=np.eye(3, dtype=np.float32), labels=np.asarray([2, 1, 3]))
    (archive := tmp_path / "a").mkdir()
    (tmp_path / "r.npz").rename(archive / "r.npz")
    data, _ = _imported(archive / "r.npz", GRADES)
    assert (data.metadata.task, data.metadata.class_names) == ("ordinal", ("1", "2", "3"))
    assert data.labels.tolist() == [1, 0, 2]


@pytest.mark.parametrize("labels", [["0", "2"], ["mild", "none"], ["1", "01"], ["3"]])
def test_grades_without_an_order_are_refused(tmp_path: Path, labels: list[str]) -> None:
    table = "path,label\n" + "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    with pytest.raises(DataError, match="grades: expected two or more, as whole numbers without a gap"):
        _listed(tmp_path, table, GRADES)


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert label_form(None, None, "a, b", "|") == LabelForm("multilabel", None, ("a", "b"))
    assert label_form("ordinal", ("x", "y"), None, ";") == LabelForm("ordinal", ("x", "y"), (), ";")
    for options in (
        ("regression", None, None, "|"),
        ("ordinal", None, "a,b", "|"),
        (None, None, "a,,b", "|"),
        (None, None, "a,a", "|"),
        (None, ("x",), "a,b", "|"),
        ("multilabel", None, None, ""),
        ("multilabel", None, None, "?"),
    ):
        with pytest.raises(ConfigError, match=r"--(task|findings|classes|separator)"):
            label_form(*options)
    with pytest.raises(ConfigError, match="give it with --labels"):
        list_folder(tmp_path, None, FolderOptions(form=LabelForm("multilabel", None, ("a",))))


def test_cells_are_in_lower_case_and_only_those_of_the_documentation() -> None:
    assert all(text == text.casefold() for text in CELLS)
    shown = (Path(__file__).parents[3] / "docs" / "files.md").read_text(encoding="utf-8")
    for value, what in ((1, "present"), (0, "absent"), (-1, "unknown")):
        line = next(line for line in shown.splitlines() if line.startswith(f"| {what} |"))
        cells = {cell.strip(" `") for cell in line.split("|")[2].split(",")}
        assert cells == {text or "an empty cell" for text, meant in CELLS.items() if meant == value}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([1, 0, -1]), min_size=3, max_size=3), min_size=1, max_size=8))
def test_cells_and_names_say_the_same(rows: list[list[int]]) -> None:
    names = ("a b", "c", "d")
    texts = ["|".join(["No Finding"] * (1 not in row) + _named(names, row)) for row in rows]
    listed = names_of(LabelForm("multilabel", names), texts)
    for row, text in zip(rows, texts, strict=True):
        cells = [{1: "1", 0: "0", -1: ""}[value] for value in row]
        assert cells_of(names, cells) == listed.number(text) == tuple(row)


def _named(names: tuple[str, ...], row: list[int]) -> list[str]:
    return [name + "?" * (value == -1) for name, value in zip(names, row, strict=True) if value]


SHARED = Path(os.environ.get("FEDHYPEVAE_SHARED", Path(__file__).parents[4] / "shared")) / "data" / "odir"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the fundus set is not on this machine")
def test_fundus_set_reads_alike_from_archive_and_table(tmp_path: Path) -> None:
    (path := tmp_path / "odir.npz").symlink_to(SHARED / "odir5k-effnetlite0.npz")
    data, rejected = _imported(path, MANY, class_names="names", patients="patients")
    assert (len(data), data.labels.shape, rejected) == (6113, (6113, 15), {})
    assert data.metadata.class_counts[:3] == (2786, 1630, 215)
    assert (data.labels == -1).sum(axis=0).max() == 25  # glaucoma that is suspected
    with zipfile.ZipFile(path) as archive, archive.open("files.npy") as file:
        files = np.load(file)
    table = (SHARED / "labels.csv").read_text(encoding="utf-8").splitlines()
    header = table[0].split(",")
    by_file = {line.split(",")[0]: line.split(",") for line in table[1:]}
    places = [header.index(name) for name in data.metadata.class_names]
    for row in range(0, 6113, 100):
        cells = [by_file[str(files[row])][place] for place in places]
        assert cells_of(data.metadata.class_names, cells) == tuple(data.labels[row].tolist())
