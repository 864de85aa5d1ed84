"""`fedhypevae embed` and `fedhypevae data` as a user runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.cli import main
from embeddings.store.file import read_store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setenv("FEDHYPEVAE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["path,label,patient,place"]
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
        lines.append(f"{number}.jpg,{'ab'[number % 2]},p{number // 2},{'xy'[number % 3 == 0]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedhypevae", *(str(argument) for argument in arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _embed(monkeypatch: pytest.MonkeyPatch, home: Path, *more: object) -> int:
    labels = home / "labels.csv"
    out = home / "site.parquet"
    return _run(
        monkeypatch,
        "embed",
        home / "images",
        "--labels",
        labels,
        "--out",
        out,
        "--column",
        "place",
        "--device",
        "cpu",
        *more,
    )


def test_embed_command_then_every_data_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = home / "site.parquet"
    assert _embed(monkeypatch, home) == 0
    told = capsys.readouterr().err
    assert "24 rows (24 embedded now" in told
    assert "2 classes: a 12, b 12\n" in told
    data = read_store(store)
    assert data.embeddings.shape == (24, 1280)
    assert len(set(data.groups.tolist())) == 12
    assert _run(monkeypatch, "data", "check", store) == 0
    assert "24 of width 1280" in capsys.readouterr().out
    assert (home / "site.parquet.html").stat().st_size > 10_000
    assert _run(monkeypatch, "data", "partition", store, "--by", "place", "--out", home / "sites") == 0
    assert sorted(path.name for path in (home / "sites").iterdir()) == ["partition.png", "x.parquet", "y.parquet"]
    sites = [home / "sites" / f"{name}.parquet" for name in "xy"]
    assert sum(len(read_store(site)) for site in sites) == 24
    assert read_store(sites[0]).splits is not None
    assert _run(monkeypatch, "data", "compare", *sites) == 0
    assert "2 stores agree" in capsys.readouterr().out
    assert _run(monkeypatch, "data", "partition", store, "--by", "colour", "--out", home / "sites") == 2
    assert "expected iid, dirichlet, patient, place; found 'colour'" in capsys.readouterr().err


def test_embed_command_bad_file_is_exit_code_1_and_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "images" / "5.jpg").write_bytes(b"broken")
    assert _embed(monkeypatch, home) == 1
    errors = capsys.readouterr().err
    assert "rejected: 5.jpg: can't be read (no image, or a damaged one)" in errors
    assert len(read_store(home / "site.parquet")) == 23


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--slices", "some"], "--slices: expected all, middle; found 'some'"),
        (["--window", "40"], "--window: expected CENTER,WIDTH, found '40'"),
        (["--encoder", "dinov2-base"], "expected a pinned revision"),
        (["--label-column", "dx"], "missing: dx"),
        (["--classes", "a,a"], "class list"),
        (["--precision", "float8"], "float32"),
        (["--batch-size", "0"], "batch size"),
    ],
)
def test_embed_command_wrong_setting_is_exit_code_2(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert _embed(monkeypatch, home, *more) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (home / "site.parquet").exists()


def test_embed_command_medmnist_and_import(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    arrays: dict[str, np.ndarray] = {}
    for split, size in (("train", 6), ("val", 2), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(size) % 2)[:, None]
    np.savez(home / "m.npz", **arrays)
    assert _run(monkeypatch, "embed", home / "m.npz", "--out", home / "m.parquet", "--device", "cpu") == 0
    data = read_store(home / "m.parquet")
    assert data.splits is not None
    assert data.splits.tolist() == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert not list(home.glob(".m.parquet.work*"))
    np.savez(home / "r.npz", embeddings=data.embeddings, labels=data.labels)
    declared = ["--encoder", "e", "--revision", "1", "--preprocessing", "none"]
    assert _run(monkeypatch, "data", "import", home / "r.npz", "--out", home / "r.parquet", *declared) == 0
    assert "2 classes: 0 5, 1 5\n" in capsys.readouterr().out
    np.testing.assert_array_equal(read_store(home / "r.parquet").embeddings, data.embeddings)
    assert _run(monkeypatch, "data", "compare", home / "m.parquet", home / "r.parquet") == 1
    assert "r.parquet: encoder is e" in capsys.readouterr().out
    assert _run(monkeypatch, "embed", home / "r.npz", "--out", home / "q.parquet", "--device", "cpu") == 2
    assert "fedhypevae data import" in capsys.readouterr().err


def test_data_check_problem_is_exit_code_1(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _embed(monkeypatch, home) == 0
    import shutil

    shutil.copy(home / "images" / "0.jpg", home / "images" / "copy.jpg")
    with (home / "labels.csv").open("a") as file:
        file.write("copy.jpg,b,p9,x\n")
    assert _embed(monkeypatch, home) == 0
    assert _run(monkeypatch, "data", "check", home / "site.parquet") == 1
    shown = capsys.readouterr().out
    assert "1 pairs of equal or nearly equal rows have different labels" in shown
    assert "1 pairs of equal or nearly equal rows belong to different patients" in shown
    assert "--images FOLDER" in shown
    assert _run(monkeypatch, "data", "check", home / "site.parquet", "--images", home / "images") == 1
    shown = capsys.readouterr().out
    assert "(0.jpg) = " in shown
    assert "(copy.jpg)" in shown
    assert _run(monkeypatch, "data", "check", home / "site.parquet", "--images", home / "no") == 2
    assert _run(monkeypatch, "data", "check", home / "none.parquet") == 2


@pytest.mark.parametrize(
    ("labels", "counts", "remarks"),
    [
        (["1", "1.0", "0"], "3 classes: 0 1, 1 1, 1.0 1", ["'1' and '1.0' differ only in case, blanks or '.0'"]),
        (["nan", "NA", "a"], "3 classes: NA 1, a 1, nan 1", ["'NA' is a usual word", "'nan' is a usual word"]),
        (["Benign", "benign", "x"], "3 classes: Benign 1, benign 1, x 1", ["'Benign' and 'benign' differ only"]),
        (["a", "b", "b"], "2 classes: a 1, b 2", []),
    ],
)
def test_embed_prints_the_classes_and_remarks_on_odd_ones(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    labels: list[str],
    counts: str,
    remarks: list[str],
) -> None:
    rows = [f"{number}.jpg,{label},p,x" for number, label in enumerate(labels)]
    (home / "labels.csv").write_text("\n".join(["path,label,patient,place", *rows]))
    _embed(monkeypatch, home)
    told = capsys.readouterr().err
    assert counts in told
    assert told.count("remark:") == len(remarks)
    assert all(remark in told for remark in remarks)


def test_findings_from_a_table_to_its_report(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paths have no suffix: nothing but `embed` itself needs to know how its table is written."""
    rows = [f"{number},{number % 2},{'u' if number % 3 else 1},p{number // 2}" for number in range(24)]
    (home / "labels.csv").write_text("\n".join(["id,mass,effusion,patient", *rows, "24,1,9,p12"]) + "\n")
    table = [
        "embed",
        home / "images",
        "--labels",
        home / "labels.csv",
        "--out",
        home / "site.parquet",
        "--device",
        "cpu",
    ]
    table += ["--path-column", "id", "--path-suffix", ".jpg", "--findings", "effusion,mass"]
    assert _run(monkeypatch, *table) == 1
    shown = capsys.readouterr().err
    assert "2 findings: effusion 8, mass 12" in shown
    assert "rejected: 24.jpg: effusion is '9'; expected 1 (present)" in shown
    assert read_store(home / "site.parquet").metadata.task == "multilabel"
    assert _run(monkeypatch, *table, "--task", "ordinal") == 2
    assert "--findings name a column for each finding" in capsys.readouterr().err
    assert _run(monkeypatch, "data", "check", home / "site.parquet", "--images", home / "images") == 0
    assert "most of effusion: 66.7%" in " ".join(capsys.readouterr().out.split())
    assert _run(monkeypatch, "data", "partition", home / "site.parquet", "--sites", 2, "--out", home / "sites") == 0
    parts = [read_store(home / "sites" / f"site-0{number}.parquet") for number in (0, 1)]
    assert {part.metadata.task for part in parts} == {"multilabel"}
    assert not set(parts[0].groups.tolist()) & set(parts[1].groups.tolist())


def test_stores_hold_their_findings_against_each_other(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = ["--encoder", "e", "--revision", "1", "--preprocessing", "p", "--task", "multilabel"]
    for site, names, first in (("a", "mass,effusion", 1), ("b", "Mass,effusion", -1)):
        labels = np.asarray([[first, 0], [1, 0], [0, 1], [0, 0]])
        np.savez(home / f"{site}.npz", embeddings=np.eye(4, dtype=np.float32), labels=labels)
        out = home / f"{site}.parquet"
        assert (
            _run(monkeypatch, "data", "import", home / f"{site}.npz", "--out", out, *declared, "--classes", names) == 0
        )
    capsys.readouterr()
    assert _run(monkeypatch, "data", "compare", home / "a.parquet", home / "b.parquet") == 0
    shown = capsys.readouterr().out
    assert "effusion: a.parquet 25.0% of 4, b.parquet 25.0% of 4" in shown
    assert "mass: a.parquet 50.0% of 4, b.parquet -" in shown
    assert "Mass: a.parquet -, b.parquet 33.3% of 3" in shown
    assert "not labelled everywhere, and unknown where not: Mass, mass" in shown
    assert "'Mass' and 'mass' differ only in case" in shown


def test_embed_makes_no_salt_before_its_words_are_checked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "classes.txt").write_bytes("bösartig".encode("cp1252"))
    for wrong in (["--classes", home / "classes.txt"], ["--slices", "some"], ["--window", "4"]):
        assert _embed(monkeypatch, home, *wrong) == 2
        assert not (home / "home").exists()


def test_embed_takes_every_file_name_of_a_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    folder = home / "folder" / "a"
    folder.mkdir(parents=True)
    for number, name in enumerate([b"0.jpg", b"gr\xf6\xdfe.jpg", b"bad\xff.jpg"]):
        (home / "images" / f"{number}.jpg").rename(folder / os.fsdecode(name))
    (folder / os.fsdecode(b"bad\xff.jpg")).write_bytes(b"broken")
    code = _run(monkeypatch, "embed", home / "folder", "--out", home / "o.parquet", "--device", "cpu")
    told = capsys.readouterr().err
    assert code == 1
    assert "2 rows" in told
    assert "bad\\udcff.jpg" in told
    assert len(read_store(home / "o.parquet")) == 2


def test_embed_remarks_on_sixteen_bits_of_which_twelve_are_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 1, 2):
        values = np.arange(600, dtype=np.uint16).reshape(20, 30) * (6 if number else 100)
        Image.fromarray(values).save(home / "images" / f"{number}.png")
    rows = [f"{number}.png,a,p,x" for number in (0, 1, 2)]
    (home / "labels.csv").write_text("\n".join(["path,label,patient,place", *rows]))
    _embed(monkeypatch, home)
    told = " ".join(capsys.readouterr().err.split())
    assert "use 12 of them at most, and so are nearly black: 2 (such as 1.png)" in told


def _store(path: Path, rows: int = 40, names: tuple[str, ...] = ("a", "b"), seed: int = 0) -> Path:
    from common.wire.identity import EncoderIdentity
    from embeddings.store.sets import EmbeddingSet, SetMetadata
    from embeddings.store.writing import write_store

    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, 8)).astype(np.float32)
    identity = EncoderIdentity("e", "1", 8, "p", "d", "float32", names)
    write_store(path, EmbeddingSet(values, rng.integers(0, len(names), rows), SetMetadata(identity)))
    return path


def _change(path: Path, change: str) -> None:
    """A store as another tool leaves it: rows changed, the metadata kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if change == "dropped row":
        table = table.slice(0, len(table) - 1)
    elif change == "no row":
        table = table.slice(0, 0)
    elif change == "order":
        table = table.take(list(range(len(table)))[::-1])
    elif change == "label":
        labels = table["label"].to_pylist()
        position = table.schema.get_field_index("label")
        table = table.set_column(position, table.schema.field("label"), pa.array([1 - labels[0], *labels[1:]]))
    elif change == "further column":
        field = pa.field("note", pa.string(), nullable=False)
        table = table.append_column(field, pa.array(["x"] * len(table)))
    pq.write_table(table, path)


@pytest.mark.parametrize("change", ["dropped row", "no row", "order", "label", "further column"])
def test_data_check_refuses_what_training_refuses(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    from common.errors import DataError

    store = _store(home / "s.parquet")
    assert _run(monkeypatch, "data", "check", store) == 0
    _change(store, "rewritten")
    assert _run(monkeypatch, "data", "check", store) == 0
    capsys.readouterr()
    _change(store, change)
    with pytest.raises(DataError) as refused:
        read_store(store)
    assert _run(monkeypatch, "data", "check", store) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert " ".join(str(refused.value).split()) in told
    assert "Problems to put right" in (home / "s.parquet.html").read_text()


def test_data_check_draws_a_set_of_thousands_of_classes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = _store(home / "s.parquet", 30, tuple(str(number) for number in range(8141)))
    assert _run(monkeypatch, "data", "check", store) == 0
    assert f"{len(set(read_store(store).labels.tolist()))} of 8141 present" in " ".join(capsys.readouterr().out.split())
    assert (home / "s.parquet.html").stat().st_size > 10_000


def test_data_partition_refuses_values_that_would_be_one_file(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.eye(8, dtype=np.float32)
    np.savez(home / "r.npz", embeddings=rows, labels=np.arange(8) % 2, place=np.asarray(["a/b", "a b"] * 4))
    declared = ["--encoder", "e", "--revision", "1", "--preprocessing", "p", "--column", "place"]
    assert _run(monkeypatch, "data", "import", home / "r.npz", "--out", home / "r.parquet", *declared) == 0
    assert _run(monkeypatch, "data", "partition", home / "r.parquet", "--by", "place", "--out", home / "sites") == 2
    assert "'a b' and 'a/b'" in capsys.readouterr().err
    assert not (home / "sites").exists()
