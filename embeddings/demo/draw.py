"""Draw the demonstration's 6,000 images from OrganAMNIST: the same file, byte for byte, on every run.

The three published splits are pooled and each class keeps its share, so that the demonstration sees the
imbalance of the full set. The zip members carry a fixed date and are deflated at a fixed level: with the same
zlib, two runs give the same bytes.

    python -m embeddings.demo.draw organamnist.npz embeddings/demo/organamnist6000.npz
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_IMAGES = 6_000
SEED = 20_240_601
_SPLITS = ("train", "val", "test")
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def stratified_rows(labels: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose `size` rows so that each class keeps its share, rounded by largest remainders.

    Args:
        labels: (n,) class of each row, from 0.
        size: rows to choose, 1..n.
        rng: generator of the draw.

    Returns:
        (size,) row numbers, shuffled.
    """
    counts = np.bincount(labels)
    exact = counts * (size / labels.size)
    take = np.floor(exact).astype(np.int64)
    for label in np.argsort(take - exact, kind="stable")[: size - int(take.sum())]:
        take[label] += 1
    chosen = [
        rng.choice(np.flatnonzero(labels == label), int(count), replace=False) for label, count in enumerate(take)
    ]
    return rng.permutation(np.concatenate(chosen))


def write_npz(path: Path, arrays: dict[str, NDArray[np.uint8]]) -> None:
    """Write arrays as a compressed `.npz` whose bytes depend on nothing but the arrays.

    Args:
        path: the file to write.
        arrays: name -> array; the order is kept.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0))
            info = zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            info.create_system = 3
            archive.writestr(info, member.getvalue(), compresslevel=9)


def draw(source: Path, target: Path) -> None:
    """Draw the demonstration's images.

    Args:
        source: `organamnist.npz` of MedMNIST v2 (28x28).
        target: the file to write: `images` (6000, 28, 28) uint8, `labels` (6000,) uint8.
    """
    with np.load(source) as full:
        images = np.concatenate([full[f"{split}_images"] for split in _SPLITS])
        labels = np.concatenate([full[f"{split}_labels"].ravel() for split in _SPLITS]).astype(np.int64)
    rows = stratified_rows(labels, NUM_IMAGES, np.random.default_rng(SEED))
    write_npz(target, {"images": images[rows], "labels": labels[rows].astype(np.uint8)})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
