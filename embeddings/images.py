"""Decode raster images (PNG, JPEG, TIFF, ...) to 8-bit pixels, refusing what is hostile or damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.errors import DataError

MAX_PIXELS = 80_000_000  # below the size at which Pillow itself warns
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm", ".ppm", ".gif")
_TOO_LARGE = (
    f"more than {MAX_PIXELS:,} pixels are refused (a small file with so many may be a decompression bomb); "
    "make the image smaller or leave it out"
)
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM", "GIF")


def check_size(name: str, width: int, height: int) -> None:
    """Refuse an image that would fill the memory when decoded.

    Args:
        name: the file, for the message.
        width: pixels.
        height: pixels.

    Raises:
        DataError: no pixels, or more than `MAX_PIXELS`.
    """
    if width < 1 or height < 1:
        raise DataError(f"{name}: expected an image, found {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width}x{height} pixels; {_TOO_LARGE}")


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
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return _pixels(picture, name)
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{name}: {_TOO_LARGE}") from None
    except OSError as error:
        reason = error.strerror or "no image, or a damaged one"
        raise DataError(f"{name}: can't be read ({reason})") from None
    except Exception as error:  # a damaged file may raise anything in a decoder; it must cost this file only
        raise DataError(f"{name}: can't be decoded ({type(error).__name__})") from None


def _pixels(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    if picture.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(picture).astype(np.int64)
        return (np.clip(values, 0, 65_535) >> 8).astype(np.uint8)
    if picture.mode == "F":
        raise DataError(f"{name}: floating-point images have no fixed range; convert to 8 or 16 bits first")
    if picture.mode in ("1", "L"):
        return np.asarray(picture if picture.mode == "L" else picture.convert("L"))
    if picture.mode in ("LA", "RGBA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return np.asarray(Image.alpha_composite(ground, rgba).convert("RGB"))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
