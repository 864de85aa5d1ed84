from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from common.errors import DataError
from embeddings import extract as extract_module
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.load import load_encoder
from embeddings.extract import Outcome, _write_rejects, extract, reject_file, work_folder
from embeddings.readers.dicom_picture import Window
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.labels import LabelColumns
from embeddings.store.file import read_store

SALT = bytes(range(32))
OPTIONS = FolderOptions(columns=LabelColumns(patient="who", extra=("place",)))


def _make(root: Path, count: int) -> Path:
    folder = root / "images"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    lines = ["path,label,who,place"]
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(folder / f"i{number:04d}.png")
        lines.append(f"i{number:04d}.png,{'ab'[number % 2]},person-{number // 3},site-{number % 4}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def _run(root: Path, model: Path, out: str = "out.parquet", precision: str = "float32") -> Outcome:
    listing = list_folder(root / "images", root / "labels.csv", OPTIONS)
    encoder = load_encoder(str(model), EncoderOptions(batch_size=4))
    return extract(listing, encoder, root / out, SALT, precision=precision)


def test_extract_store_holds_what_the_labels_say(tmp_path: Path, tiny_dinov2: Path) -> None:
    folder = _make(tmp_path, 21)
    outcome = _run(tmp_path, tiny_dinov2)
    assert (outcome.rows, outcome.embedded, outcome.reused, outcome.rejected) == (21, 21, 0, ())
    data = read_store(tmp_path / "out.parquet")
    images = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    expected = load_encoder(str(tiny_dinov2)).embed(images)
    np.testing.assert_allclose(data.embeddings, expected, atol=1e-5)
    assert data.labels.tolist() == [number % 2 for number in range(21)]
    assert data.columns["place"].tolist() == [f"site-{number % 4}" for number in range(21)]
    assert data.groups is not None
    assert [data.groups[number] == data.groups[0] for number in range(6)] == [True] * 3 + [False] * 3
    assert not work_folder(tmp_path / "out.parquet").exists()


def test_extract_store_has_no_name_or_patient_in_it(tmp_path: Path, tiny_dinov2: Path) -> None:
    _make(tmp_path, 9)
    _run(tmp_path, tiny_dinov2)
    raw = (tmp_path / "out.parquet").read_bytes()
    for text in (b"i000", b".png", b"person", str(tmp_path).encode()):
        assert text not in raw
    assert b"site-" in raw


def test_extract_second_run_embeds_new_images_only(tmp_path: Path, tiny_dinov2: Path) -> None:
    folder = _make(tmp_path, 12)
    first = _run(tmp_path, tiny_dinov2)
    before = read_store(tmp_path / "out.parquet")
    stamp = (tmp_path / "out.parquet").stat().st_mtime_ns
    again = _run(tmp_path, tiny_dinov2)
    assert (again.embedded, again.reused, again.fingerprint) == (0, 12, first.fingerprint)
    assert (tmp_path / "out.parquet").stat().st_mtime_ns == stamp
    Image.fromarray(np.full((9, 9), 3, dtype=np.uint8)).save(folder / "new.png")
    (folder / "i0003.png").unlink()
    text = (tmp_path / "labels.csv").read_text().replace("i0003.png,b,person-1,site-3\n", "")
    text = text.replace("i0000.png,a", "i0000.png,b") + "new.png,a,person-9,site-0\n"
    (tmp_path / "labels.csv").write_text(text)
    third = _run(tmp_path, tiny_dinov2)
    assert (third.rows, third.embedded, third.reused, third.dropped) == (12, 1, 11, 1)
    data = read_store(tmp_path / "out.parquet")
    kept = [number for number in range(12) if number != 3]
    np.testing.assert_array_equal(data.embeddings[:11], before.embeddings[kept])
    assert data.labels.tolist() == [1, *(number % 2 for number in kept[1:]), 0]


def test_extract_changed_file_is_embedded_again(tmp_path: Path, tiny_dinov2: Path) -> None:
    folder = _make(tmp_path, 6)
    _run(tmp_path, tiny_dinov2)
    Image.fromarray(np.full((50, 50), 77, dtype=np.uint8)).save(folder / "i0002.png")
    outcome = _run(tmp_path, tiny_dinov2)
    assert (outcome.rows, outcome.embedded, outcome.dropped) == (6, 1, 1)


def test_extract_lists_bad_files_and_keeps_good_ones(tmp_path: Path, tiny_dinov2: Path) -> None:
    folder = _make(tmp_path, 8)
    (folder / "i0002.png").write_bytes(b"not an image")
    outcome = _run(tmp_path, tiny_dinov2)
    assert outcome.rows == 7
    with reject_file(tmp_path / "out.parquet").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "reason"]
    assert rows[1][0] == "i0002.png"
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(folder / "i0002.png")
    assert _run(tmp_path, tiny_dinov2).rejected == ()
    assert not reject_file(tmp_path / "out.parquet").exists()


def test_extract_nothing_usable_writes_no_store(tmp_path: Path, tiny_dinov2: Path) -> None:
    folder = _make(tmp_path, 2)
    for path in folder.iterdir():
        path.write_bytes(b"bad")
    with pytest.raises(DataError, match="none of 2 images could be used"):
        _run(tmp_path, tiny_dinov2)
    assert not (tmp_path / "out.parquet").exists()
    assert reject_file(tmp_path / "out.parquet").exists()


def test_extract_refuses_another_encoder_or_precision(
    tmp_path: Path, tiny_dinov2: Path, tiny_dinov2_registers: Path
) -> None:
    _make(tmp_path, 3)
    _run(tmp_path, tiny_dinov2)
    before = (tmp_path / "out.parquet").read_bytes()
    with pytest.raises(DataError, match=r"another encoder \(encoder: local:dinov2"):
        _run(tmp_path, tiny_dinov2_registers)
    with pytest.raises(DataError, match="holds float32, not float16"):
        _run(tmp_path, tiny_dinov2, precision="float16")
    assert (tmp_path / "out.parquet").read_bytes() == before


def test_extract_window_is_part_of_what_sites_compare(tmp_path: Path, tiny_dinov2: Path) -> None:
    pydicom_data = pytest.importorskip("pydicom.data")
    (tmp_path / "a").mkdir()
    scan = Path(str(pydicom_data.get_testdata_file("CT_small.dcm")))
    (tmp_path / "a" / "x.dcm").write_bytes(scan.read_bytes())
    encoder = load_encoder(str(tiny_dinov2))
    stores = []
    for number, window in enumerate((Window(40, 400), Window(40, 80), Window(40, 400))):
        listing = list_folder(tmp_path, None, FolderOptions(window=window, patients=False))
        extract(listing, encoder, tmp_path.parent / f"{tmp_path.name}-{number}.parquet", SALT)
        stores.append(read_store(tmp_path.parent / f"{tmp_path.name}-{number}.parquet"))
    prints = [store.metadata.identity.fingerprint() for store in stores]
    assert prints[0] == prints[2] != prints[1]
    assert stores[0].metadata.identity.preprocessing.startswith("dicom window 40,400; pil ")
    assert np.abs(stores[0].embeddings - stores[1].embeddings).max() > 1e-3


def test_extract_takes_parts_of_the_same_encoder_only(
    tmp_path: Path, tiny_dinov2: Path, tiny_dinov2_registers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path, 12)
    monkeypatch.setattr(extract_module, "PART_ROWS", 4)
    monkeypatch.setattr(extract_module, "write_chunks", _fails)
    with pytest.raises(RuntimeError):
        _run(tmp_path, tiny_dinov2)
    monkeypatch.undo()
    other = _run(tmp_path, tiny_dinov2_registers)
    assert (other.resumed, other.embedded) == (0, 12)


def test_extract_damaged_part_is_embedded_again(
    tmp_path: Path, tiny_dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path, 12)
    whole = _run(tmp_path, tiny_dinov2, "whole.parquet")
    monkeypatch.setattr(extract_module, "PART_ROWS", 4)
    monkeypatch.setattr(extract_module, "write_chunks", _fails)
    with pytest.raises(RuntimeError):
        _run(tmp_path, tiny_dinov2)
    monkeypatch.undo()
    parts = sorted(work_folder(tmp_path / "out.parquet").glob("part-*"))
    assert len(parts) == 3
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    outcome = _run(tmp_path, tiny_dinov2)
    assert (outcome.resumed, outcome.embedded) == (8, 4)
    assert outcome.fingerprint == whole.fingerprint


def _fails(*args: object, **kwargs: object) -> str:
    raise RuntimeError("stopped before writing")


def test_extract_refuses_a_second_writer(tmp_path: Path, tiny_dinov2: Path) -> None:
    _make(tmp_path, 2)
    with FileLock(tmp_path / ".out.parquet.lock"), pytest.raises(DataError, match="another extraction"):
        _run(tmp_path, tiny_dinov2)


_SCRIPT = """
import os, sys
from pathlib import Path
from embeddings import extract as module
from embeddings.readers.dicom import Window
from embeddings.encoders.load import EncoderOptions, load_encoder
from embeddings.readers.labels import LabelColumns
from embeddings.readers.folders import FolderOptions, list_folder
root, model, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if limit:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
module.PART_ROWS = 8
options = FolderOptions(columns=LabelColumns(patient="who", extra=("place",)))
listing = list_folder(root / "images", root / "labels.csv", options)
encoder = load_encoder(model, EncoderOptions(batch_size=4))
print("ready", flush=True)
done = 0
def advance(amount):
    global done
    done += amount
    if limit and done > 40:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
outcome = module.extract(listing, encoder, root / "out.parquet", bytes(range(32)), advance=advance)
print("resumed", outcome.resumed, "embedded", outcome.embedded)
"""


def _start(root: Path, limit: int = 0) -> subprocess.Popen[str]:
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(root), "efficientnet-lite0", str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_extract_killed_at_random_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = _make(tmp_path, 200)
    (folder / "i0007.png").write_bytes(b"bad")
    whole = _start(tmp_path)
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    expected = (tmp_path / "out.parquet").read_bytes()
    (tmp_path / "out.parquet").unlink()
    kills = 0
    draw = random.Random(5)
    for _ in range(3):
        process = _start(tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.02, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (tmp_path / "out.parquet").exists():
            assert (tmp_path / "out.parquet").read_bytes() == expected
            break
    assert kills >= 1
    last = _start(tmp_path)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert (tmp_path / "out.parquet").read_bytes() == expected
    leftovers = {path.name for path in tmp_path.iterdir()} - {"images", "labels.csv", "out.parquet"}
    assert leftovers == {".out.parquet.lock", "out.parquet.rejected.csv"}


@pytest.mark.slow
def test_extract_full_disk_keeps_finished_parts(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up."""
    pytest.importorskip("efficientnet_lite_pytorch")
    _make(tmp_path, 120)
    process = _start(tmp_path, limit=500)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "finished parts are kept: make room and run the same command again" in errors
    assert not (tmp_path / "out.parquet").exists()
    assert not list(work_folder(tmp_path / "out.parquet").glob("*.partial"))
    again = _start(tmp_path)
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    resumed, embedded = (int(word) for word in output.split()[2::2])
    assert resumed >= 40
    assert resumed + embedded == 120
    assert len(read_store(tmp_path / "out.parquet")) == 120


def test_names_in_the_list_of_rejected_files_are_no_formulas(tmp_path: Path) -> None:
    path = tmp_path / "out.rejected.csv"
    _write_rejects(path, (("=cmd|'/C calc'!A0.png", "damaged"), ("\x1b[2J.png", "@SUM(1)"), ("a/-b.png", "damaged")))
    rows = list(csv.reader(path.read_text().splitlines()))
    assert rows[1:] == [["'=cmd|'/C calc'!A0.png", "damaged"], ["\\x1b[2J.png", "'@SUM(1)"], ["a/-b.png", "damaged"]]
