"""The canary: one image that every site embeds, so that wrong weights or a wrong backend show before a run.

`canary.png` is drawn by `draw` and shows nothing but shapes and noise; its embedding tells about software,
not data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.encoders.base import Encoder

CANARY_FILE = Path(__file__).parent / "canary.png"


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
    from embeddings.readers.images import read_image

    prepared = encoder.prepare(read_image(CANARY_FILE, CANARY_FILE.name))
    batch = np.zeros((encoder.batch_size, *prepared.shape), dtype=prepared.dtype)
    batch[0] = prepared
    return encoder.forward(batch)[0]
