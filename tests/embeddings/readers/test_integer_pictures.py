"""TIFF and PNG of every form of whole numbers: right by the formats' own text, or refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from embeddings.readers.images import Shallow, read_image

FAST = settings(max_examples=300)
WIDTH, HEIGHT = 13, 5


def tiff(
    values: np.ndarray,
    bits: int,
    *,
    white: bool = False,
    form: int = 1,
    big: bool = False,
    packed: bool = False,
    turn: int = 1,
    planes: int = 1,
) -> bytes:
    """A TIFF of one strip, by hand: samples of so many bits packed into bytes, (h, w) or (h, w, 3)."""
    order, samples = ">" if big else "<", 1 if values.ndim == 2 else values.shape[2]
    flat = values.reshape(len(values), -1)
    if bits < 8 or bits == 12:  # rows end at a byte
        places = np.arange(bits - 1, -1, -1)
        strip = np.packbits((flat[..., None] >> places & 1).reshape(len(flat), -1).astype(np.uint8), axis=1).tobytes()
    else:
        kind = {1: "u", 2: "i", 3: "f"}[form]
        strip = flat.astype(f"{order}{kind}{bits // 8}").tobytes()
    strip = zlib.compress(strip) if packed else strip
    tags = [
        (256, 4, 1, values.shape[1]),
        (257, 4, 1, values.shape[0]),
        (259, 3, 1, 8 if packed else 1),
        (274, 3, 1, turn),
        (277, 3, 1, samples),
        (284, 3, 1, planes),
    ]
    tags += [
        (262, 3, 1, 2 if samples == 3 else 0 if white else 1),
        (278, 4, 1, values.shape[0]),
        (279, 4, 1, len(strip)),
    ]
    start = 8 + 2 + 12 * 12 + 4
    triples = {258: [bits] * samples, 339: [form] * samples}
    for tag, numbers in triples.items():
        tags.append((tag, 3, samples, numbers[0] if samples == 1 else start + (6 if tag == 339 else 0)))
    tags.append((273, 4, 1, start + 12))
    table = struct.pack(f"{order}H", len(tags))
    for tag, kind_of, count, value in sorted(tags):
        short = kind_of == 3 and count == 1
        field = struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
        table += struct.pack(f"{order}HHI", tag, kind_of, count) + field
    more = b"".join(struct.pack(f"{order}3H", *(numbers * 3)[:3]) for numbers in triples.values())
    return (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8) + table + bytes(4) + more + strip


def png(values: np.ndarray, bits: int, clear: bytes = b"") -> bytes:
    """A PNG of grey or RGB by hand; `clear` names a transparent value."""
    samples = 1 if values.ndim == 2 else values.shape[2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    flat = values.reshape(len(values), -1)
    if bits < 8:
        places = np.arange(bits - 1, -1, -1)
        rows = np.packbits((flat[..., None] >> places & 1).reshape(len(flat), -1).astype(np.uint8), axis=1)
    else:
        rows = np.frombuffer(flat.astype(f">u{bits // 8}").tobytes(), np.uint8).reshape(len(flat), -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0 if samples == 1 else 2, 0, 0, 0)
    parts = [(b"IHDR", header), *([(b"tRNS", clear)] if clear else []), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, part) for kind, part in parts)


def _read(tmp_path: Path, content: bytes) -> np.ndarray:
    (tmp_path / "a").write_bytes(content)
    return read_image(tmp_path / "a", "a")


def _expected(values: np.ndarray, bits: int, white: bool = False) -> np.ndarray:
    """The upper byte, or the range of fewer bits spread over 0..255; white is zero by tag 262 of TIFF 6.0."""
    placed = (1 << bits) - 1 - values if white else values
    return placed >> (bits - 8) if bits >= 8 else placed * 255 // ((1 << bits) - 1)


@FAST
@given(
    bits=st.sampled_from([1, 2, 4, 8, 12, 16]),
    white=st.booleans(),
    big=st.booleans(),
    colour=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_tiff_of_every_form_is_right(
    tmp_path: Path, bits: int, white: bool, big: bool, colour: bool, packed: bool, seed: int
) -> None:
    colour, white = colour and bits in (8, 16), white and not colour
    values = np.random.default_rng(seed).integers(0, 1 << bits, (HEIGHT, WIDTH, 3) if colour else (HEIGHT, WIDTH))
    content = tiff(values, bits, white=white, big=big, packed=packed)
    shown = _read(tmp_path, content)
    np.testing.assert_array_equal(shown.reshape(values.shape), _expected(values, bits, white))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize(("bits", "samples", "packed"), [(8, 1, False), (8, 1, True), (16, 1, False), (8, 3, False)])
def test_turned_tiff_is_upright(tmp_path: Path, turn: int, bits: int, samples: int, packed: bool) -> None:
    """By the text of TIFF 6.0, tag 274: where the first row and the first column lie."""
    shape = (HEIGHT, WIDTH) if samples == 1 else (HEIGHT, WIDTH, 3)
    values = np.random.default_rng(turn).integers(0, 1 << bits, shape)
    turned = values.swapaxes(0, 1)
    straight = [values, values[:, ::-1], values[::-1, ::-1], values[::-1]]
    upright = [*straight, turned, turned[:, ::-1], turned[::-1, ::-1], turned[::-1]][turn - 1]
    content = tiff(values, bits, turn=turn, packed=packed)
    np.testing.assert_array_equal(_read(tmp_path, content), _expected(upright, bits))


@pytest.mark.parametrize("big", [False, True])
def test_colour_of_sixteen_bits_plane_by_plane_is_refused(tmp_path: Path, big: bool) -> None:
    values = np.zeros((HEIGHT, WIDTH, 3), dtype=int)
    with pytest.raises(DataError, match=r"^a: colour of 16 bits, plane by plane"):
        _read(tmp_path, tiff(values, 16, planes=2, big=big))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_lies_on_black(tmp_path: Path, bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (HEIGHT, WIDTH))
    key = int(values.max())
    shown = _read(tmp_path, png(values, bits, struct.pack(">H", key)))
    np.testing.assert_array_equal(shown, np.where(values == key, 0, _expected(values, bits)))


def test_a_transparent_colour_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH, 3), dtype=int)
    with pytest.raises(DataError, match=r"^a: 16 bits with one transparent colour"):
        _read(tmp_path, png(values, 16, bytes(6)))


@FAST
@given(bits=st.sampled_from([1, 2, 4, 8, 16]), colour=st.booleans(), seed=st.integers(0, 1 << 32))
def test_png_of_every_form_is_right(tmp_path: Path, bits: int, colour: bool, seed: int) -> None:
    colour = colour and bits >= 8
    values = np.random.default_rng(seed).integers(0, 1 << bits, (HEIGHT, WIDTH, 3) if colour else (HEIGHT, WIDTH))
    np.testing.assert_array_equal(_read(tmp_path, png(values, bits)), _expected(values, bits))


@pytest.mark.parametrize(
    ("bits", "form", "text"), [(16, 2, "signed"), (32, 1, "32-bit"), (32, 2, "signed"), (8, 2, "signed")]
)
@pytest.mark.parametrize("big", [False, True])
def test_what_has_no_fixed_range_is_refused(tmp_path: Path, bits: int, form: int, text: str, big: bool) -> None:
    values = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    unknown = big and (bits, form) == (32, 1)  # to Pillow
    with pytest.raises(DataError, match="^a: can't be read" if unknown else f"^a: {text} images have no fixed range"):
        _read(tmp_path, tiff(values, bits, form=form, big=big))


@pytest.mark.parametrize("big", [False, True])
def test_floats_are_refused(tmp_path: Path, big: bool) -> None:
    with pytest.raises(DataError, match=r"^a: floating-point images have no fixed range"):
        _read(tmp_path, tiff(np.zeros((HEIGHT, WIDTH)), 32, form=3, big=big))


@pytest.mark.parametrize("kind", ["png", "tiff", "white", "colour png", "colour tiff"])
def test_twelve_bits_in_sixteen_are_remarked_on(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(1).integers(0, 4096, (HEIGHT, WIDTH, 3) if "colour" in kind else (HEIGHT, WIDTH))
    for factor, expected in ((1, True), (16, False)):
        full = values * factor
        content: Any = png(full, 16) if "png" in kind else tiff(full, 16, white=kind == "white")
        assert isinstance(_read(tmp_path, content), Shallow) == expected
    assert not isinstance(_read(tmp_path, png(np.zeros((HEIGHT, WIDTH), int), 8)), Shallow)
