from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, DataError
from embeddings.readers.classes import class_list
from embeddings.readers.dicom_picture import Window
from embeddings.readers.findings import LabelForm
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.labels import LabelColumns, read_labels


def _image(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), value, dtype=np.uint8)).save(path)
    return path


def _labels(folder: Path, text: str) -> Path:
    path = folder.parent / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        _image(tmp_path / "images" / f"i{number}.png", number)
    return tmp_path / "images"


def test_list_folder_sub_folders_are_classes(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/deep/b.png", "dog/c.png", "stray.png", "dog/.hidden.png"):
        _image(tmp_path / name)
    (tmp_path / "README.txt").write_text("x")
    listing = list_folder(tmp_path, None, FolderOptions())
    assert [(item.source, item.label) for item in listing.items] == [
        ("cat/a.png", 0),
        ("cat/deep/b.png", 0),
        ("dog/c.png", 1),
    ]
    assert listing.class_names == ("cat", "dog")
    assert [name for name, _ in listing.rejected] == ["stray.png"]


def test_list_folder_label_file_gives_labels_patients_and_columns(folder: Path) -> None:
    text = "id;dx;who;place\ni0;b;p1;x\ni1;a;p1;y\ni2;b;p2;x\ni3;b;p3;z\n"
    columns = LabelColumns("id", "dx", "who", ("place",), ".png")
    listing = list_folder(folder, _labels(folder, text), FolderOptions(columns=columns))
    assert [item.label for item in listing.items] == [1, 0, 1, 1]
    assert [item.patient for item in listing.items] == ["p1", "p1", "p2", "p3"]
    assert [item.columns for item in listing.items] == [("x",), ("y",), ("x",), ("z",)]
    assert listing.column_names == ("place",)
    assert listing.rejected == ()
    assert [int(item.load()[0, 0]) for item in listing.items] == [0, 1, 2, 3]
    without = list_folder(folder, _labels(folder, text), FolderOptions(columns=columns, patients=False))
    assert {item.patient for item in without.items} == {None}


def test_list_folder_rejects_one_by_one_and_keeps_the_rest(folder: Path, tmp_path: Path) -> None:
    _image(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    text = (
        "path,label\ni0.png,a\ni1.png,a\ni1.png,b\n../secret.png,a\nlink.png,a\n/etc/passwd,a\nnone.png,a\n"
        "i2.png,\ni0.png,a\ni3.png,odd\n,a\n"
    )
    listing = list_folder(folder, _labels(folder, text), FolderOptions(form=LabelForm(classes=("a", "b"))))
    assert [item.source for item in listing.items] == ["i0.png"]
    reasons = dict(listing.rejected)
    assert set(reasons) == {
        "i1.png",
        "../secret.png",
        "link.png",
        "/etc/passwd",
        "none.png",
        "i2.png",
        "i3.png",
        "<line 12>",
    }
    assert "two rows that differ" in reasons["i1.png"]
    for name in ("../secret.png", "link.png", "/etc/passwd"):
        assert "outside the folder" in reasons[name]
    assert "no such file" in reasons["none.png"]
    assert "no label" in reasons["i2.png"]
    assert "unknown label 'odd'; expected a, b" in reasons["i3.png"]
    assert listing.remarks == ("labels.csv: 1 rows repeat an earlier one and count once",)


def test_list_folder_two_spellings_of_one_file_are_one_row(folder: Path) -> None:
    text = "path,label\ni0.png,a\n./i0.png,b\ni1.png,a\n./i1.png,a\ni2.png,a\ni3.png,a\n"
    listing = list_folder(folder, _labels(folder, text), FolderOptions())
    assert [item.source for item in listing.items] == ["i1.png", "i2.png", "i3.png"]
    assert [name for name, _ in listing.rejected] == ["./i0.png"]


def test_list_folder_names_images_without_a_row(folder: Path) -> None:
    listing = list_folder(folder, _labels(folder, "path,label\ni0.png,a\n"), FolderOptions())
    assert [name for name, _ in listing.rejected] == ["i1.png", "i2.png", "i3.png"]
    assert all("no row" in reason for _, reason in listing.rejected)


def test_list_folder_rejects_the_few_images_without_a_patient(tmp_path: Path) -> None:
    for number, patient in enumerate(["Doe", "Roe", ""]):
        _ct(tmp_path / "a" / f"{number}.dcm", PatientID=patient)
    listing = list_folder(tmp_path, None, FolderOptions())
    assert [item.patient for item in listing.items] == ["Doe", "Roe"]
    assert [name for name, _ in listing.rejected] == ["a/2.dcm"]


def test_list_folder_patients_of_some_images_only_is_refused(folder: Path) -> None:
    pydicom_file = _ct(folder / "scan.dcm")
    text = f"path,label\ni0.png,a\n{pydicom_file.name},a\n"
    with pytest.raises(DataError, match=r"known for 1 of 2 images.*--no-patients"):
        list_folder(folder, _labels(folder, text), FolderOptions())


def _ct(path: Path, **changes: object) -> Path:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)
    return path


def test_list_folder_series_of_files_by_folder_row(tmp_path: Path) -> None:
    for number in range(5):
        name = f"images/series/x{9 - number}.dcm"
        _ct(tmp_path / name, InstanceNumber=number, SeriesInstanceUID="1.2.3", PatientID="Doe")
    folder = tmp_path / "images"
    labels = _labels(folder, "path,label\nseries,sick\n")
    every = list_folder(folder, labels, FolderOptions())
    assert len(every.items) == 5
    assert {item.patient for item in every.items} == {"Doe"}
    middle = list_folder(folder, labels, FolderOptions(slices="middle"))
    assert [item.source for item in middle.items] == ["series/x7.dcm"]


def test_list_folder_multi_frame_file_gives_all_or_the_middle(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    import shutil

    from pydicom.data import get_testdata_file

    (tmp_path / "a").mkdir()
    shutil.copy(str(get_testdata_file("rtdose.dcm")), tmp_path / "a" / "dose.dcm")
    assert len(list_folder(tmp_path, None, FolderOptions()).items) == 15
    middle = list_folder(tmp_path, None, FolderOptions(slices="middle", window=Window(1e6, 5e5)))
    assert [item.source for item in middle.items] == ["a/dose.dcm#7"]
    assert middle.items[0].load().shape == (10, 10)
    assert middle.rendering == "dicom window 1e+06,500000; "


def test_list_folder_without_images_or_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one sub-folder of images per class"):
        list_folder(tmp_path, None, FolderOptions())
    with pytest.raises(DataError, match="expected a folder"):
        list_folder(tmp_path / "none", None, FolderOptions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "missing: path, label"),
        (b"path,label\n", "at least one row"),
        (b"file,class\na,b\n", "--path-column"),
        (b"path,label\n\xff\xfe,a\n", "UTF-8"),
        (b'path,label\n"a', None),
    ],
)
def test_read_labels_refuses_files_as_a_whole(tmp_path: Path, content: bytes, message: str | None) -> None:
    (tmp_path / "l.csv").write_bytes(content)
    if message is None:
        assert read_labels(tmp_path / "l.csv", LabelColumns()).rejected
        return
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "l.csv", LabelColumns())


def test_read_labels_takes_a_byte_order_mark_and_tabs(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("\ufeffpath\tlabel\tpatient\na,b.png\tx\tp\n".encode())
    table = read_labels(tmp_path / "l.csv", LabelColumns())
    assert table.rows["a,b.png"].label == "x"
    assert table.has_patients


def test_class_list_orders_numbers_by_value() -> None:
    assert class_list(None, ["10", "9", "2", "9"]) == ("2", "9", "10")
    assert class_list(None, ["b", "a"]) == ("a", "b")
    assert class_list(["z", "a"], ["a"]) == ("z", "a")
    with pytest.raises(ConfigError, match="different, non-empty"):
        class_list(["a", "a"], [])


def test_list_folder_unreadable_file_is_rejected_on_loading(folder: Path) -> None:
    listing = list_folder(
        folder, _labels(folder, "path,label\ni0.png,a\ni1.png,a\ni2.png,a\ni3.png,a\n"), FolderOptions()
    )
    (folder / "i2.png").unlink()
    with pytest.raises(DataError, match=r"^i2.png: can't be read \(No such file"):
        listing.items[2].load()
