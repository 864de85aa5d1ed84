"""The canary: one image that every site embeds, so that wrong weights or a wrong backend show beforehand.

`canary.png` is drawn by `draw` and shows nothing but shapes and noise; its embedding tells about software,
not data.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from embeddings.encoders import Encoder
from embeddings.identity import Mismatch

CANARY_FILE = Path(__file__).parent / "canary.png"
# Relative distances. Measured between one and two threads, batch sizes and folded weights: below 1e-5;
# another
# resizing rule gives more than 1e-2.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def draw() -> NDArray[np.uint8]:
    """Draw the canary: ramps, rings, stripes of rising frequency and noise, (150, 200, 3) uint8."""
    y, x = np.mgrid[0:150, 0:200].astype(np.float64)
    rings = 127.5 + 127.5 * np.cos(np.hypot(x - 130.0, y - 60.0) ** 1.3 / 9.0)
    stripes = 127.5 + 127.5 * np.sign(np.sin(x * x / 400.0))
    picture = np.stack([rings, np.where(y > 90.0, stripes, 255.0 * x / 200.0), 255.0 * y / 150.0], axis=2)
    noise = np.random.default_rng(2026).integers(-24, 25, picture.shape)
    return np.clip(np.rint(picture) + noise, 0, 255).astype(np.uint8)


def embed_canary(encoder: Encoder) -> NDArray[np.float32]:
    """Embed the canary through the same steps as a site's images; returns (d,) float32."""
    from embeddings.images import read_image

    prepared = encoder.prepare(read_image(CANARY_FILE, CANARY_FILE.name))
    batch = np.zeros((encoder.batch_size, *prepared.shape), dtype=prepared.dtype)
    batch[0] = prepared
    return encoder.forward(batch)[0]


def encode(embedding: NDArray[np.float32]) -> str:
    """Write an embedding as text (base64 of little-endian float32)."""
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()


def decode(text: str) -> NDArray[np.float32]:
    """Read `encode`'s text; raises `DataError` when it is none."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
    except (binascii.Error, ValueError):
        raise DataError("canary: expected an embedding as base64 text; extract the set again") from None


def compare_canaries(canaries: Mapping[str, NDArray[np.float32]], precision: str) -> tuple[Mismatch, ...]:
    """Find the sites whose canary embedding differs from the others'.

    The reference is the coordinate-wise median over the sites, so that one wrong site does not blame the
    right ones. With two sites that differ, both are named.

    Args:
        canaries: site name -> (d,) embedding.
        precision: arithmetic of the encoder; sets the tolerance.

    Returns:
        One `Mismatch` per site that differs by more than the tolerance; empty when all agree.

    Raises:
        DataError: no sites, or a precision without a tolerance.
    """
    if not canaries or precision not in TOLERANCE:
        known = ", ".join(TOLERANCE)
        raise DataError(f"canaries: expected sites and a precision of {known}; found {precision}")
    widths = [vector.size for vector in canaries.values()]
    width = max(set(widths), key=widths.count)
    fitting = np.stack([vector for vector in canaries.values() if vector.size == width])
    reference = np.median(fitting.astype(np.float64), axis=0)
    scale = max(float(np.linalg.norm(reference)), 1e-12)
    limit = TOLERANCE[precision]
    found = []
    for site, vector in canaries.items():
        if vector.size != width:
            found.append(Mismatch(site, "canary embedding", f"{width} values", f"{vector.size} values"))
            continue
        distance = float(np.linalg.norm(vector - reference)) / scale
        if not distance <= limit:
            expected = f"within {limit:g} of each other"
            found.append(Mismatch(site, "canary embedding", expected, f"{distance:.3g} away"))
    return tuple(found)
