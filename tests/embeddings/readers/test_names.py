"""File names and label files as other systems write them: embedded, or rejected by name."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, DataError
from embeddings.extract import extract
from embeddings.pipeline import Item, Listing
from embeddings.readers.classes import class_list, given_classes
from embeddings.readers.findings import LabelForm
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.labels import LabelColumns, read_labels
from embeddings.readers.patients import image_key, patient_number

SALT = bytes(range(32))
LATIN = os.fsdecode(b"gr\xf6\xdfe.png")  # as a Latin-1 share or a zip of Windows leaves it
COMPOSED, APART = unicodedata.normalize("NFC", "Müller.png"), unicodedata.normalize("NFD", "Müller.png")


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), 9, dtype=np.uint8)).save(path)


def _list(folder: Path, rows: str, **options: object) -> Listing:
    (folder.parent / "labels.csv").write_text("path,label\n" + rows, encoding="utf-8")
    return list_folder(folder, folder.parent / "labels.csv", FolderOptions(**options))  # type: ignore[arg-type]


def test_keys_of_names_in_utf_8_are_those_of_before_and_others_have_one() -> None:
    import hashlib
    import hmac

    for name in ("a/0.png", "größe.png", "名.png"):
        wanted = hmac.digest(SALT, b"image\0" + f"{name}\0-1".encode(), hashlib.sha256)[:16]
        assert image_key(SALT, name, -1) == wanted
    assert image_key(SALT, LATIN) == hmac.digest(SALT, b"image\0gr\xf6\xdfe.png", hashlib.sha256)[:16]
    assert isinstance(patient_number(SALT, LATIN), int)


def test_list_folder_keeps_a_file_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    _image(tmp_path / "a" / "0.png")
    _image(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / LATIN)
    listing = list_folder(tmp_path, None, FolderOptions())
    assert [item.source for item in listing.items] == ["a/0.png", f"a/{LATIN}"]
    assert [item.load().shape for item in listing.items] == [(4, 4), (4, 4)]
    assert len({image_key(SALT, *item.stamp) for item in listing.items}) == 2


@pytest.mark.parametrize("name", [os.fsdecode(b"\xd6dem"), " ", "\u200b"])
def test_list_folder_rejects_a_class_folder_without_a_usable_name(tmp_path: Path, name: str) -> None:
    _image(tmp_path / "good" / "0.png")
    _image(tmp_path / "odd" / "1.png")
    (tmp_path / "odd").rename(tmp_path / name)
    listing = list_folder(tmp_path, None, FolderOptions())
    assert listing.class_names == ("good",)
    assert [source for source, _ in listing.rejected] == [f"{name}/1.png"]
    assert "rename it" in listing.rejected[0][1]


def test_list_folder_spells_a_class_in_one_way(tmp_path: Path) -> None:
    _image(tmp_path / unicodedata.normalize("NFC", "Ödem") / "0.png")
    _image(tmp_path / unicodedata.normalize("NFD", "Ödem") / "1.png")
    listing = list_folder(
        tmp_path, None, FolderOptions(form=LabelForm(classes=(unicodedata.normalize("NFD", "Ödem"),)))
    )
    assert listing.class_names == (unicodedata.normalize("NFC", "Ödem"),)
    assert len(listing.items) == 2


@pytest.mark.parametrize(("on_disk", "in_table"), [(COMPOSED, APART), (APART, COMPOSED), (APART, APART)])
def test_list_folder_finds_a_file_however_its_accents_are_stored(tmp_path: Path, on_disk: str, in_table: str) -> None:
    _image(tmp_path / "images" / "deep" / on_disk)
    listing = _list(tmp_path / "images", f"./deep/{in_table},a\n")
    assert [item.source for item in listing.items] == [f"deep/{on_disk}"]
    assert listing.rejected == ()


def test_list_folder_finds_a_folder_however_its_accents_are_stored(tmp_path: Path) -> None:
    _image(tmp_path / "images" / unicodedata.normalize("NFD", "Müller") / "0.png")
    listing = _list(tmp_path / "images", unicodedata.normalize("NFC", "Müller") + ",a\n")
    assert len(listing.items) == 1


def test_list_folder_takes_the_exact_name_where_both_spellings_are_there(tmp_path: Path) -> None:
    _image(tmp_path / "images" / COMPOSED)
    _image(tmp_path / "images" / APART)
    listing = _list(tmp_path / "images", f"{COMPOSED},a\n{APART},b\n")
    assert {item.source: item.label for item in listing.items} == {COMPOSED: 0, APART: 1}


def test_list_folder_rejects_a_name_that_may_be_either_of_two(tmp_path: Path) -> None:
    one, two, three = "\u1ebf.png", "\u00ea\u0301.png", "e\u0302\u0301.png"  # e with two accents, stored in three ways
    _image(tmp_path / "images" / one)
    _image(tmp_path / "images" / two)
    listing = _list(tmp_path / "images", f"{one},a\n{three},a\n")
    assert [item.source for item in listing.items] == [one]
    assert "several files have this name" in dict(listing.rejected)[three]


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "none.png", "a/" * 400])
def test_list_folder_rejects_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    _image(tmp_path / "images" / "0.png")
    listing = _list(tmp_path / "images", f"0.png,a\n{name},a\n")
    assert [item.source for item in listing.items] == ["0.png"]
    assert [source for source, _ in listing.rejected] == [name]


def test_extract_embeds_a_name_that_is_no_utf_8(tmp_path: Path, tiny_dinov2: Path) -> None:
    from embeddings.encoders.load import load_encoder
    from embeddings.store.file import read_store

    def load() -> np.ndarray:
        return np.zeros((8, 8), dtype=np.uint8)

    def fail() -> np.ndarray:
        raise DataError(f"{LATIN}: can't be read")

    items = (Item("0.png", load, 0, stamp=("0.png",)), Item(LATIN, load, 0, stamp=(LATIN,)))
    bad = Item("b" + LATIN, fail, 0, stamp=("b" + LATIN,))
    encoder = load_encoder(str(tiny_dinov2))
    outcome = extract(Listing((*items, bad), (), ("a",)), encoder, tmp_path / "o.parquet", SALT)
    assert outcome.rows == len(read_store(tmp_path / "o.parquet")) == 2
    assert "gr\\udcf6\\udcdfe.png" in (tmp_path / "o.parquet.rejected.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\na,b\n".encode("utf-16"), "UTF-8"),
        ("path,label\nö,b\n".encode("cp1252"), "UTF-8"),
        ("path,label\na,b\n".encode("utf-16-le"), "is it UTF-16"),
        (b"path,label,label\na,b,c\n", "column label comes twice"),
        (b"path,path,label\na,b,c\n", "column path comes twice"),
        (b"path,label,patient,patient\na,b,c,d\n", "column patient comes twice"),
        (b"path,label, label \na,b,c\n", "column label comes twice"),
    ],
)
def test_read_labels_refuses_other_encodings_and_double_columns(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "l.csv", LabelColumns())


def test_read_labels_does_not_mind_a_double_column_that_it_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,label,,,note,note\na,b,,,x,y\n")
    assert read_labels(tmp_path / "l.csv", LabelColumns()).rows["a"].label == "b"
    with pytest.raises(DataError, match="column note comes twice"):
        read_labels(tmp_path / "l.csv", LabelColumns(extra=("note",)))


@pytest.mark.parametrize("extra", [("x", "x"), ("label",), ("patient",), ("split",), ("embedding",), ("key",)])
def test_read_labels_refuses_further_columns_that_a_store_has(tmp_path: Path, extra: tuple[str, ...]) -> None:
    (tmp_path / "l.csv").write_text("path,label,x,patient,split,embedding,key\na,b,c,d,e,f,g\n")
    with pytest.raises(ConfigError, match="different names"):
        read_labels(tmp_path / "l.csv", LabelColumns(extra=extra))


def test_read_labels_leaves_out_empty_rows_and_rejects_a_quote_left_open(tmp_path: Path) -> None:
    content = '"path";"label";"patient";"a, b, c, d"\n  \n1;x;p;\n;;;\n2;"x;q;\n3;y;r;\n4;y";s;\n5;x;"t\nu";\n;;;\n'
    (tmp_path / "l.csv").write_text(content)
    table = read_labels(tmp_path / "l.csv", LabelColumns())
    assert {path: row.label for path, row in table.rows.items()} == {"1": "x"}
    assert set(table.rejected) == {"2", "5"}
    assert all("several lines" in reason for reason in table.rejected.values())


def test_read_labels_strips_and_composes_every_cell(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(" path ,label\n\ufeffa , O\u0308dem\nb\0c,x\nd,e\0f\n", encoding="utf-8")
    table = read_labels(tmp_path / "l.csv", LabelColumns())
    assert {path: row.label for path, row in table.rows.items()} == {"a": "\u00d6dem"}
    assert set(table.rejected) == {"b\0c", "d"}


@pytest.mark.parametrize(
    "content", ["benign\nmalignant\n", "\ufeffbenign\r\nmalignant", "\n benign \n\n\tmalignant\u200b\n"]
)
def test_given_classes_reads_a_list_or_a_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "classes.txt").write_bytes(content.encode())
    assert (
        given_classes(str(tmp_path / "classes.txt")) == given_classes(" benign, malignant") == ("benign", "malignant")
    )


def test_given_classes_takes_a_list_that_is_longer_than_a_file_name(tmp_path: Path) -> None:
    names = tuple(f"class number {number}" for number in range(100))
    assert given_classes(",".join(names)) == names


def test_given_classes_refuses_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("bösartig".encode("cp1252"))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        given_classes(str(tmp_path / "classes.txt"))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        class_list([os.fsdecode(b"b\xf6se")], [])
    with pytest.raises(ConfigError, match="different, non-empty"):
        class_list([unicodedata.normalize("NFC", "ö"), unicodedata.normalize("NFD", "ö")], [])


def test_read_labels_finds_a_column_however_its_accents_are_stored(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("Datei," + unicodedata.normalize("NFC", "Schlüssel") + "\na,b\n", encoding="utf-8")
    columns = LabelColumns("Datei", unicodedata.normalize("NFD", "Schlüssel"))
    assert read_labels(tmp_path / "l.csv", columns).rows["a"].label == "b"


@pytest.mark.parametrize("name", ["label", "embedding", "x"])
def test_stores_with_a_column_twice_are_refused(tmp_path: Path, name: str) -> None:
    import pyarrow.parquet as pq

    from common.wire.identity import EncoderIdentity
    from embeddings.store.file import read_metadata, read_store, read_usable
    from embeddings.store.sets import EmbeddingSet, SetMetadata
    from embeddings.store.writing import write_store

    identity = EncoderIdentity("e", "1", 4, "p", "d", "float32", ("a", "b"))
    rows = np.eye(4, dtype=np.float32)
    texts = {"x": np.asarray(["u"] * 4)}
    write_store(tmp_path / "s.parquet", EmbeddingSet(rows, np.arange(4) % 2, SetMetadata(identity), columns=texts))
    table = pq.read_table(tmp_path / "s.parquet")
    pq.write_table(table.append_column(table.schema.field(name), table[name]), tmp_path / "s.parquet")
    for read in (read_store, read_usable, read_metadata):
        with pytest.raises(DataError, match=f"column {name} comes twice"):
            read(tmp_path / "s.parquet")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["int64", "float64", "bool", "large_string"])
def test_stores_with_a_column_of_another_kind_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from common.wire.identity import EncoderIdentity
    from embeddings.store.file import read_store
    from embeddings.store.sets import EmbeddingSet, SetMetadata
    from embeddings.store.writing import write_store

    identity = EncoderIdentity("e", "1", 4, "p", "d", "float32", ("a", "b"))
    rows = np.eye(4, dtype=np.float32)
    write_store(tmp_path / "s.parquet", EmbeddingSet(rows, np.arange(4) % 2, SetMetadata(identity)))
    table = pq.read_table(tmp_path / "s.parquet")
    further = pa.array([1, 0, 1, 0]).cast(kind)
    pq.write_table(table.append_column("z", further), tmp_path / "s.parquet")
    with pytest.raises(DataError, match="column z"):
        read_store(tmp_path / "s.parquet")


def test_archives_with_an_array_twice_are_refused(tmp_path: Path) -> None:
    import io
    import zipfile

    from embeddings.readers.ready import ReadyNames, read_ready

    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        for name, values in (("embeddings", np.eye(4)), ("labels", np.arange(4) % 2), ("labels", np.arange(4) % 3)):
            sink = io.BytesIO()
            np.save(sink, values)
            archive.writestr(f"{name}.npy", sink.getvalue())
    with pytest.raises(DataError, match="array labels comes twice"):
        read_ready(tmp_path / "r.npz", tmp_path / "work", ReadyNames(), LabelForm())


def test_a_store_is_not_written_where_it_could_not_be_read(tmp_path: Path, tiny_dinov2: Path) -> None:
    from embeddings.encoders.load import load_encoder

    def fail() -> np.ndarray:
        raise AssertionError("nothing is read before the place is checked")

    listing = Listing((Item("0.png", fail, 0, stamp=("0.png",)),), (), ("a",))
    with pytest.raises(DataError, match="path must be in UTF-8"):
        extract(listing, load_encoder(str(tiny_dinov2)), tmp_path / os.fsdecode(b"k\xf6ln.parquet"), SALT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", [False, True])
def test_list_folder_waits_for_no_pipe_and_names_links_to_nothing(tmp_path: Path, table: bool) -> None:
    folder = tmp_path / "images"
    _image(folder / "a" / "0.png")
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "link.png").symlink_to("nothing.png")
    (tmp_path / "l.csv").write_text("path,label\na/0.png,x\na/link.png,x\na/pipe.png,x\n")
    listing = list_folder(folder, tmp_path / "l.csv" if table else None, FolderOptions())
    assert [item.source for item in listing.items] == ["a/0.png"]
    assert set(dict(listing.rejected)) == {"a/link.png", "a/pipe.png"}
    unnamed = _list(folder, "a/0.png,x\n")
    assert [item.source for item in unnamed.items] == ["a/0.png"]
