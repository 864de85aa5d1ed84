from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.wire.identity import EncoderIdentity
from embeddings.bounded import unpack
from embeddings.readers.arrays import is_medmnist, list_medmnist
from embeddings.readers.findings import LabelForm
from embeddings.readers.patients import patient_number
from embeddings.readers.ready import ReadyNames, import_ready
from embeddings.store.file import read_store

DECLARED = EncoderIdentity("sscd", "1", 0, "288 px", "declared", "float32", ())
SALT = bytes(range(32))


def _medmnist(path: Path, rng: np.random.Generator, **changed: np.ndarray) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for split, size in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 3, (size, 1))
    arrays["train_labels"][0] = 2
    arrays.update(changed)
    np.savez_compressed(path, **arrays)
    return arrays


def test_list_medmnist_keeps_split_order_and_pixels(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = _medmnist(tmp_path / "m.npz", rng)
    assert is_medmnist(tmp_path / "m.npz")
    listing = list_medmnist(tmp_path / "m.npz", tmp_path / "work", LabelForm())
    assert [item.split for item in listing.items] == ["train"] * 5 + ["validation"] * 2 + ["test"] * 3
    assert listing.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(listing.items[6].load(), arrays["val_images"][1])
    assert [item.label for item in listing.items[:5]] == arrays["train_labels"].ravel().tolist()
    assert len({item.stamp for item in listing.items}) == 10


def test_list_medmnist_rejects_labels_outside_the_class_list(tmp_path: Path, rng: np.random.Generator) -> None:
    _medmnist(tmp_path / "m.npz", rng)
    listing = list_medmnist(tmp_path / "m.npz", tmp_path / "work", LabelForm(classes=("a", "b")))
    assert listing.class_names == ("a", "b")
    assert listing.rejected[0] == ("m.npz[train_images][0]", "unknown label 2; expected 0..1")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("val_images", np.zeros((2, 28, 28), dtype=np.float32), r"expected val_images as \(n, h, w\)"),
        ("test_labels", np.zeros((3, 2), dtype=np.int64), "one whole number per image"),
        ("test_labels", np.zeros((2, 1), dtype=np.int64), "one whole number per image"),
    ],
)
def test_list_medmnist_refuses_other_shapes(
    tmp_path: Path, rng: np.random.Generator, name: str, value: np.ndarray, message: str
) -> None:
    _medmnist(tmp_path / "m.npz", rng, **{name: value})
    with pytest.raises(DataError, match=message):
        list_medmnist(tmp_path / "m.npz", tmp_path / "work", LabelForm())


def test_unpack_never_reads_pickled_objects(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", evil=np.asarray([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="the array evil is damaged"):
        unpack(tmp_path / "m.npz", "evil", tmp_path / "work")
    with pytest.raises(DataError, match="expected an array called other"):
        unpack(tmp_path / "m.npz", "other", tmp_path / "work")


def test_unpack_finds_damage(tmp_path: Path, rng: np.random.Generator) -> None:
    _medmnist(tmp_path / "m.npz", rng)
    content = bytearray((tmp_path / "m.npz").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "m.npz", "train_images", tmp_path / "work")
    (tmp_path / "n.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"expected an \.npz"):
        is_medmnist(tmp_path / "n.npz")


def test_import_ready_rejects_rows_of_zeros_alone(tmp_path: Path) -> None:
    rows = np.asarray([[1, 2], [0, 0], [0, 3]], dtype=np.float32)
    np.savez(tmp_path / "r.npz", embeddings=rows, labels=np.asarray([0, 0, 1]))
    kept, rejected = import_ready(
        tmp_path / "r.npz", tmp_path / "o.parquet", ReadyNames(), LabelForm(), DECLARED, SALT, "float32"
    )
    assert (kept, rejected) == (2, (("r.npz[1]", "values that are not finite, or all zero"),))


def test_import_ready_hashes_patients_and_keeps_columns(tmp_path: Path, rng: np.random.Generator) -> None:
    embeddings = rng.standard_normal((6, 4)).astype(np.float16)
    embeddings[4, 1] = np.nan
    np.savez(
        tmp_path / "r.npz",
        embeddings=embeddings,
        labels=np.asarray([0, 1, 1, 0, 1, 7]),
        class_names=np.asarray(["no", "yes"]),
        lesion=np.asarray(["l1", "l1", "l2", "l3", "l3", "l4"]),
        site=np.asarray([0, 0, 1, 1, 2, 2]),
    )
    names = ReadyNames(patients="lesion", columns=("site",))
    rows, rejected = import_ready(
        tmp_path / "r.npz", tmp_path / "o.parquet", names, LabelForm(), DECLARED, SALT, "float16"
    )
    assert rows == 4
    assert rejected == (
        ("r.npz[4]", "values that are not finite, or all zero"),
        ("r.npz[5]", "unknown label 7; expected 0..1"),
    )
    data = read_store(tmp_path / "o.parquet")
    np.testing.assert_array_equal(data.embeddings, embeddings[:4].astype(np.float32))
    assert data.labels.tolist() == [0, 1, 1, 0]
    assert data.metadata.class_names == ("no", "yes")
    assert data.groups.tolist() == [patient_number(SALT, name) for name in ("l1", "l1", "l2", "l3")]
    assert data.columns["site"].tolist() == ["0", "0", "1", "1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.parquet", "r.npz"]
    raw = (tmp_path / "o.parquet").read_bytes()
    assert b"l1" not in raw


def test_import_ready_takes_labels_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", embeddings=np.eye(3, dtype=np.float32), labels=np.asarray(["b", "a", "c"]))
    rows, rejected = import_ready(
        tmp_path / "r.npz",
        tmp_path / "o.parquet",
        ReadyNames(),
        LabelForm(classes=("a", "b")),
        DECLARED,
        SALT,
        "float32",
    )
    assert rows == 2
    assert rejected == (("r.npz[2]", "unknown label c; expected a, b"),)
    assert read_store(tmp_path / "o.parquet").labels.tolist() == [1, 0]


@pytest.mark.filterwarnings("error")
def test_import_ready_rejects_what_float32_cannot_hold_without_a_warning(tmp_path: Path) -> None:
    rows = np.eye(4) * np.asarray([1.0, 1e300, 1.0, 1.0])
    np.savez(tmp_path / "r.npz", embeddings=rows, labels=np.arange(4) % 2)
    declared = EncoderIdentity("sscd", "1", 0, "288 px", "declared", "float32", ())
    kept, rejected = import_ready(
        tmp_path / "r.npz", tmp_path / "o.parquet", ReadyNames(), LabelForm(), declared, bytes(32), "float32"
    )
    assert (kept, rejected) == (3, (("r.npz[1]", "values that are not finite, or all zero"),))
