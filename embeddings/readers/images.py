"""Decode raster images (PNG, JPEG, TIFF, ...) to 8-bit pixels, refusing what is hostile or damaged."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin

from common.errors import DataError
from embeddings.limits import MAX_PIXELS, MIB, PICTURE_RATIO, check_scans, check_size, check_unpacked, decoding

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm", ".ppm", ".gif")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF")


# Pillow looks at sizes itself where a decoder allocates as the file is opened, and refuses twice this number.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Forms of TIFF that Pillow can decode and does not list: zero as white in big endian; 12 bits, which have no byte order
for _order, _photometric, _bits, _modes in (
    (b"MM", 0, 16, ("I;16B", "I;16B")),
    (b"II", 0, 12, ("I;16", "I;12")),
    (b"MM", 0, 12, ("I;16", "I;12")),
    (b"MM", 1, 12, ("I;16", "I;12")),
):
    TiffImagePlugin.OPEN_INFO.setdefault((_order, _photometric, (1,), 1, (_bits,), ()), _modes)
_TIFF_BLOCKS = ((322, 323), (256, 278))  # width and height of a tile, and of a strip: each is a decoder's buffer
_STRIP_PIXELS = 4_000_000


class Shallow(np.ndarray[Any, Any]):
    """Pixels of a picture of 16 bits that uses 12 of them at most, and so is nearly black."""


def read_image(path: Path, name: str) -> NDArray[np.uint8]:
    """Decode the first picture of a file.

    Orientation marks are applied; transparency lies on black; 12 and 16 bits are mapped to 8 by their upper ones (a
    fixed rule: two sites with the same file get the same pixels). What has no fixed range is refused: floats, signed
    numbers, numbers of 32 bits.

    Args:
        path: the file.
        name: how messages name it.

    Returns:
        (h, w) uint8 for grey images, (h, w, 3) uint8 for others; `Shallow` where they are that.

    Raises:
        DataError: the file can't be read, is no image, is damaged or too large, or has no fixed range.
    """
    try:
        # an open file: Pillow maps one that it opens itself, and then mixes up the rows of a turned TIFF picture
        with path.open("rb") as file, Image.open(file, formats=_FORMATS) as picture:
            check_size(name, *picture.size)
            check_unpacked(
                name, picture.size[0] * picture.size[1] * len(picture.getbands()), path.stat().st_size, PICTURE_RATIO
            )
            if picture.format in ("JPEG", "MPO"):
                check_scans(name, iter(partial(file.read, MIB), b""))
            for tags in _TIFF_BLOCKS if picture.format == "TIFF" else ():
                _check_block(picture, name, tags)
            form = _form(picture, name)
            with decoding(picture.size[0] * picture.size[1]):
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                pixels = _pixels(picture, form)
                if form.bits == 16 and (pixels.min() > 239 if form.inverted else pixels.max() < 16):
                    return pixels.view(Shallow)
                return pixels
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(
            f"{name}: more than {MAX_PIXELS:,} pixels (it may be a decompression bomb); leave it out"
        ) from None
    except MemoryError:
        raise DataError(f"{name}: decoding needs more memory than there is") from None
    except OSError as error:
        reason = error.strerror or "no image, or a damaged one"
        raise DataError(f"{name}: can't be read ({reason})") from None
    except Exception as error:  # a damaged file may raise anything in a decoder; it must cost this file only
        raise DataError(f"{name}: can't be decoded ({type(error).__name__})") from None


def _check_block(picture: Any, name: str, tags: tuple[int, int]) -> None:
    """Refuse a TIFF file whose tiles or strips are larger than any picture: its decoder holds a whole one."""
    width, height = (int(picture.tag_v2.get(tag, 1)) for tag in tags)
    check_size(name, width, min(height, picture.size[1]) if tags == (256, 278) else height)


class _Form(NamedTuple):
    """Bits of a sample in the file where they are more than 8 (else 8), and whether zero is white in it.

    `clear` is the grey value that is transparent, as Pillow gives it.
    """

    bits: int
    inverted: bool
    clear: int | None = None


def _form(picture: Any, name: str) -> _Form:
    """What a file says of its samples beyond Pillow's mode, which is one for many forms.

    Source: TIFF 6.0, tags 258 (BitsPerSample), 262 (PhotometricInterpretation), 284
    (PlanarConfiguration), 339 (SampleFormat); PNG, tRNS.
    """
    tags = picture.tag_v2 if picture.format == "TIFF" else {}
    signed = any(kind == 2 for kind in tags.get(339, ()))
    if picture.mode == "F" or signed or (picture.mode == "I" and tags):
        kind = "floating-point" if picture.mode == "F" else "signed" if signed else "32-bit"
        raise DataError(f"{name}: {kind} images have no fixed range; convert to 8 or 16 bits first")
    if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8 and picture.tile and picture.tile[0][0] == "raw":
        # Pillow takes each plane for one of bytes
        raise DataError(f"{name}: colour of 16 bits, plane by plane, is not read here; store it pixel by pixel")
    if picture.mode.startswith("I;16") and tags:  # Pillow turns white round with 8 bits and fewer alone
        return _Form(int(tags.get(258, (16,))[0]), tags.get(262) == 0)
    deep = picture.mode.startswith("I") or any(";16" in str(tile[3]) for tile in picture.tile)
    clear = picture.info.get("transparency")
    if deep and isinstance(clear, tuple):
        raise DataError(f"{name}: 16 bits with one transparent colour, of which 8 are read; store it without it")
    if picture.mode in ("1", "L") and isinstance(
        clear, int
    ):  # as it stands in the file, in which grey may have 1 to 8 bits
        high = {"1": 1, "L;2": 3, "L;4": 15}.get(str(picture.tile[0][3]), 255)
        clear = (clear & high) * 255 // high
    return _Form(16 if deep else 8, False, clear if isinstance(clear, int) else None)


def _pixels(picture: Image.Image, form: _Form) -> NDArray[np.uint8]:
    if picture.mode.startswith("I;16"):
        whole = np.asarray(picture)
        values = (whole >> (form.bits - 8)).astype(np.uint8)
        return 255 - values if form.inverted else _cleared(values, whole, form)
    if picture.mode == "I":
        whole = np.array(picture)
        return (np.clip(whole, 0, 65_535, out=whole) >> 8).astype(np.uint8)
    if picture.mode in ("1", "L"):
        grey = np.asarray(picture if picture.mode == "L" else picture.convert("L"))
        return _cleared(grey, grey, form)
    if picture.mode in ("LA", "RGBA", "PA") or "transparency" in picture.info:
        return _on_black(picture)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _cleared(shown: NDArray[np.uint8], values: NDArray[Any], form: _Form) -> NDArray[np.uint8]:
    """A grey picture whose one transparent value lies on black."""
    return shown if form.clear is None else np.where(values == form.clear, np.uint8(0), shown)


def _on_black(picture: Image.Image) -> NDArray[np.uint8]:
    """A picture with transparency on a black ground, some rows at a time: each step takes a copy."""
    width, height = picture.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        piece = picture.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        ground = Image.new("RGBA", piece.size, (0, 0, 0, 255))
        pixels[top : top + rows] = np.asarray(Image.alpha_composite(ground, piece).convert("RGB"))
    return pixels
