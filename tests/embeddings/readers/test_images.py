from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from embeddings.limits import MAX_PIXELS
from embeddings.readers.codestream import frame_size
from embeddings.readers.images import read_image


def _read(path: Path) -> np.ndarray:
    return read_image(path, path.name)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp"])
def test_read_image_lossless_formats_give_the_pixels(tmp_path: Path, suffix: str, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(_read(tmp_path / f"a{suffix}"), pixels)


def test_read_image_sixteen_bits_keep_the_upper_byte(tmp_path: Path) -> None:
    values = np.asarray([[0, 255, 256, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(_read(tmp_path / "a.png"), [[0, 0, 1, 255]])


def test_read_image_grey_stays_grey_and_bits_become_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.asarray([[0, 7]], dtype=np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(_read(tmp_path / "a.png"), [[0, 7]])
    Image.fromarray(np.asarray([[False, True]])).save(tmp_path / "b.png")
    np.testing.assert_array_equal(_read(tmp_path / "b.png"), [[0, 255]])


def test_read_image_transparency_lies_on_black(tmp_path: Path) -> None:
    pixels = np.asarray([[[200, 100, 50, 255], [200, 100, 50, 0]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(_read(tmp_path / "a.png"), [[[200, 100, 50], [0, 0, 0]]])


def test_read_image_applies_the_orientation(tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((10, 20, 3), 90, dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert _read(tmp_path / "a.jpg").shape == (20, 10, 3)


def test_read_image_refuses_a_decompression_bomb_before_decoding(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 1
    for width in (side, 60_000):
        _png_header(tmp_path / "bomb.png", width, width)
        with pytest.raises(DataError, match=r"bomb.png: .*pixels.*decompression bomb"):
            _read(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(100), b"GIF89a" + bytes(3)]
)
def test_read_image_names_files_that_are_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"^bad.png: can't be (read|decoded)"):
        _read(tmp_path / "bad.png")


def test_read_image_refuses_a_truncated_file(tmp_path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"^a\.jpg: "):
        _read(tmp_path / "a.jpg")


def test_read_image_refuses_floating_point(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 3), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="no fixed range"):
        _read(tmp_path / "a.tiff")


def _png_header(path: Path, width: int, height: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_read_image_refuses_a_picture_of_scans_without_end(tmp_path: Path, rng: np.random.Generator) -> None:
    """A progressive picture whose last scan comes 20,000 times: each passes over the whole picture."""
    pixels = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    (tmp_path / "few.jpg").write_bytes(content)
    assert _read(tmp_path / "few.jpg").shape == (64, 64)
    assert frame_size(content, "few")[:2] == (64, 64)
    last = content[content.rindex(b"\xff\xda") : -2]
    many = content[:-2] + last * 20_000 + content[-2:]
    (tmp_path / "many.jpg").write_bytes(many)
    with pytest.raises(DataError, match="scans"):
        _read(tmp_path / "many.jpg")
    with pytest.raises(DataError, match="scans"):  # as a frame of a DICOM file
        frame_size(many, "many")
