"""Decode raster images (PNG, JPEG, TIFF, ...) to 8-bit pixels, refusing what is hostile or damaged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import DataError
from embeddings.limits import MAX_PIXELS, PICTURE_RATIO, check_size, check_unpacked, decoding

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm", ".ppm", ".gif")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF")


# Pillow looks at sizes itself where a decoder allocates as the file is opened, and refuses twice this number.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_TIFF_BLOCKS = ((322, 323), (256, 278))  # width and height of a tile, and of a strip: each is a decoder's buffer
_STRIP_PIXELS = 4_000_000


def read_image(path: Path, name: str) -> NDArray[np.uint8]:
    """Decode the first picture of a file.

    Orientation marks are applied; transparency lies on black; 16 bits are mapped to 8 by their upper byte (a
    fixed rule: two sites with the same file get the same pixels).

    Args:
        path: the file.
        name: how messages name it.

    Returns:
        (h, w) uint8 for grey images, (h, w, 3) uint8 for others.

    Raises:
        DataError: the file can't be read, is no image, is damaged or too large.
    """
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            check_size(name, *picture.size)
            check_unpacked(
                name, picture.size[0] * picture.size[1] * len(picture.getbands()), path.stat().st_size, PICTURE_RATIO
            )
            for tags in _TIFF_BLOCKS if picture.format == "TIFF" else ():
                _check_block(picture, name, tags)
            with decoding(picture.size[0] * picture.size[1]):
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                return _pixels(picture, name)
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


def _pixels(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    if picture.mode in ("I;16", "I;16B", "I;16L"):
        return (np.asarray(picture) >> 8).astype(np.uint8)
    if picture.mode == "I":
        values = np.array(picture)
        return (np.clip(values, 0, 65_535, out=values) >> 8).astype(np.uint8)
    if picture.mode == "F":
        raise DataError(f"{name}: floating-point images have no fixed range; convert to 8 or 16 bits first")
    if picture.mode in ("1", "L"):
        return np.asarray(picture if picture.mode == "L" else picture.convert("L"))
    if picture.mode in ("LA", "RGBA", "PA") or "transparency" in picture.info:
        return _on_black(picture)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


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
