"""Two hundred corrupted files, and what Hypothesis makes of good ones: never a crash, never a good file lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.load import load_encoder
from embeddings.extract import extract
from embeddings.readers.dicom import read_frame, read_header
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.images import read_image
from embeddings.readers.labels import LabelColumns, read_labels
from embeddings.store.file import read_store

CORRUPTED = 200


def seeds(folder: Path) -> list[bytes]:
    """Good files of several kinds, as bytes."""
    rng = np.random.default_rng(0)
    pixels = np.cumsum(rng.integers(0, 9, (48, 64, 3)), axis=0).astype(np.uint8)
    for suffix in ("png", "jpg", "tiff", "bmp", "webp", "gif"):
        Image.fromarray(pixels).save(folder / f"seed.{suffix}")
    seeds = [(folder / f"seed.{suffix}").read_bytes() for suffix in ("png", "jpg", "tiff", "bmp", "webp", "gif")]
    try:
        from pydicom.data import get_testdata_file
    except ImportError:
        return seeds
    names = ("CT_small.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm", "MR_small_jpeg_ls_lossless.dcm")
    names += ("MR_small_jp2klossless.dcm", "rtdose_1frame.dcm")
    return seeds + [Path(str(get_testdata_file(name, download=False))).read_bytes() for name in names]


def _corrupt(content: bytes, kind: int, rng: np.random.Generator) -> bytes:
    if kind == 0:
        return content[: int(rng.integers(0, len(content)))]
    raw = bytearray(content)
    if kind == 1:
        for place in rng.integers(0, len(raw), int(rng.integers(1, 30))):
            raw[place] ^= 1 << int(rng.integers(0, 8))
    elif kind == 2:
        raw[: int(rng.integers(1, 64))] = rng.bytes(int(rng.integers(1, 64)))
    else:
        start = int(rng.integers(0, len(raw)))
        raw[start : start + 200] = rng.bytes(200)
    return bytes(raw)


@pytest.mark.slow
def test_extract_survives_200_corrupted_files(tmp_path: Path, tiny_dinov2: Path) -> None:
    rng = np.random.default_rng(11)
    kinds = seeds(tmp_path)
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number in range(CORRUPTED):
        content = _corrupt(kinds[number % len(kinds)], number // len(kinds) % 4, rng)
        (folder / f"bad{number:03d}").write_bytes(content)
    good = 30
    for number in range(good):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"good{number:03d}.png")
    listing = list_folder(tmp_path / "images", None, FolderOptions(patients=False))
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=8))
    outcome = extract(listing, encoder, tmp_path / "out.parquet", bytes(32))
    names = {source.split("#")[0] for source, _ in outcome.rejected}
    assert all(name.startswith("a/bad") for name in names)
    assert all("\n" not in reason for _, reason in outcome.rejected)
    assert len(names) > CORRUPTED // 3
    data = read_store(tmp_path / "out.parquet")
    expected = encoder.embed([np.asarray(Image.open(folder / f"good{number:03d}.png")) for number in range(good)])
    distances = np.abs(data.embeddings[:, None] - expected[None]).max(axis=2)
    assert (distances.min(axis=0) < 1e-5).all()


@settings(max_examples=150)
@given(
    content=st.binary(max_size=400),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"P5 9 9 255 "]),
)
def test_read_image_any_bytes_give_pixels_or_one_line(tmp_path: Path, content: bytes, head: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(head + content)
    message = _refusal(lambda: read_image(path, "x").dtype == np.uint8)
    assert message is None or message.startswith("x: ")


@settings(max_examples=100)
@given(place=st.integers(0, 39_000), content=st.binary(min_size=1, max_size=40))
def test_read_frame_any_damage_gives_pixels_or_one_line(tmp_path: Path, place: int, content: bytes) -> None:
    pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    raw = bytearray(Path(str(get_testdata_file("CT_small.dcm"))).read_bytes())
    raw[place : place + len(content)] = content
    path = tmp_path / "x"
    path.write_bytes(raw)
    message = _refusal(lambda: read_header(path, "x").frames > 0 and read_frame(path, "x").dtype == np.uint8)
    assert message is None or message.startswith("x: ")


@settings(max_examples=150)
@given(content=st.one_of(st.binary(max_size=200), st.text(alphabet='pathlbe,\n";\t\r0', max_size=200).map(str.encode)))
def test_read_labels_any_bytes_give_rows_or_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "l.csv"
    path.write_bytes(b"path,label\n" + content)

    def consistent() -> bool:
        table = read_labels(path, LabelColumns())
        return not set(table.rows) & set(table.rejected) and all(row.label for row in table.rows.values())

    _refusal(consistent)


def _refusal(work: Callable[[], bool]) -> str | None:
    """Run `work`, which must hold or be refused in one line; returns that line."""
    message = None
    try:
        held = work()
    except DataError as error:
        held, message = True, str(error)
    assert held
    assert message is None or "\n" not in message
    return message
