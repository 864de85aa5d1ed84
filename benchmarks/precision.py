"""What embedding in bfloat16 costs in score: a linear head on OrganAMNIST and HAM10000 by EfficientNet-Lite0.

The same images are embedded in float32 and in bfloat16. On each of several divisions (64/16/20; of HAM10000, a lesion's
images stay together) a head is fitted to the training rows and scored on the test rows of the same arithmetic, and, to
show what mixing would do, on those of the other. Differences are of pairs on the same division.

    python -m benchmarks.precision
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.records import conditions, write_result
from benchmarks.sources import data_folder, organ_draw
from common.devices import choose_device
from common.evaluation.heads import fit_linear_head
from common.evaluation.scores import score
from common.evaluation.splits import split_site
from embeddings.encoders.base import EncoderOptions, Precision
from embeddings.encoders.load import load_encoder
from embeddings.pipeline import Item, embed_batches

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
SEED = 2026

Set = tuple[list[Item], NDArray[np.int64] | None]


def organ_items(rows: int) -> Set:
    """Images of OrganAMNIST, 28x28, in the order of the comparison's draw."""
    with np.load(data_folder() / "organamnist.npz") as arrays:
        images = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
        labels = np.concatenate([arrays[f"{split}_labels"] for split in ("train", "val", "test")]).reshape(-1)
    drawn = organ_draw(len(labels))[:rows].tolist()
    return [Item(str(row), partial(images.__getitem__, row), int(labels[row])) for row in drawn], None


def ham_items(rows: int) -> Set:
    """Images of HAM10000, 200x150, in a drawn order; the group is the lesion."""
    with (data_folder() / "HAM10000_metadata.csv").open(newline="", encoding="utf-8") as file:
        about = {row["image_id"]: row for row in csv.DictReader(file)}
    with tarfile.open(data_folder() / "ham10000_200x150_jpg.tar") as archive:
        files = {
            Path(member.name).stem: picture.read()
            for member in archive
            if member.name.endswith(".jpg") and (picture := archive.extractfile(member)) is not None
        }
    names = sorted(files)
    chosen = [names[at] for at in np.random.default_rng(0).permutation(len(names))[:rows]]
    kinds = sorted({row["dx"] for row in about.values()})
    items = [Item(name, partial(_decoded, files[name]), kinds.index(about[name]["dx"])) for name in chosen]
    return items, np.unique([about[name]["lesion_id"] for name in chosen], return_inverse=True)[1]


def _decoded(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def embedded(items: list[Item], precision: Precision, device: str) -> tuple[torch.Tensor, float]:
    """Rows of unit length, as they are published, and wall seconds."""
    encoder = load_encoder("efficientnet-lite0", EncoderOptions(precision=precision, device=device))
    start = time.perf_counter()
    rows = np.concatenate([batch.embeddings for batch in embed_batches(items, encoder)])
    if len(rows) != len(items):
        raise RuntimeError(f"{len(items) - len(rows)} images could not be embedded")
    return torch.nn.functional.normalize(torch.from_numpy(rows)), time.perf_counter() - start


def divisions(labels: torch.Tensor, groups: NDArray[np.int64] | None, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Which rows train and which test, so many times."""
    for number in range(count):
        splits = split_site(labels.numpy(), np.random.default_rng([SEED, number]), groups)
        yield {name: torch.from_numpy(np.flatnonzero(splits == name)) for name in ("train", "test")}


def measure(items: list[Item], groups: NDArray[np.int64] | None, count: int, device: str) -> dict[str, Any]:
    """Scores by the arithmetic of training and test rows, and differences to float32 alone."""
    labels = torch.tensor([item.label for item in items])
    rows, spent = {}, {}
    for precision in PRECISIONS:
        rows[precision], spent[precision] = embedded(items, precision, device)
    classes = int(labels.max()) + 1
    found: dict[str, list[dict[str, float]]] = {}
    for part in divisions(labels, groups, count):
        for trained in PRECISIONS:
            head = fit_linear_head(rows[trained][part["train"]], labels[part["train"]], classes)
            for tested in PRECISIONS:
                scores = score(head, rows[tested][part["test"]], labels[part["test"]])
                each = {"accuracy": scores.accuracy, "balanced_accuracy": scores.balanced_accuracy}
                found.setdefault(f"train {trained}, test {tested}", []).append(each)
    base = found["train float32, test float32"]
    error = (rows["bfloat16"] - rows["float32"]).norm(dim=1)
    result: dict[str, Any] = {
        "rows": len(items),
        "images_per_second": {name: round(len(items) / seconds, 1) for name, seconds in spent.items()},
        "distance_of_rows": {"median": round(float(error.median()), 4), "largest": round(float(error.max()), 4)},
    }
    for name, scores_ in found.items():
        result[name] = {
            key: {
                "mean": round(100 * statistics.mean(one[key] for one in scores_), 2),
                "less_than_float32": [
                    round(100 * (one[key] - other[key]), 2) for one, other in zip(base, scores_, strict=True)
                ],
            }
            for key in base[0]
        }
    return result


def main() -> None:
    """Measure, print, and write results/precision.json, or precision_cuda.json, beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_015, help="images of each set")
    parser.add_argument("--divisions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    device = str(choose_device(asked.device))
    result: dict[str, Any] = {**conditions(), "device": device, "encoder": "efficientnet-lite0"}
    for name, made in (("organ", organ_items), ("ham", ham_items)):
        result[name] = measure(*made(asked.rows), asked.divisions, device)
        print(name, result[name], flush=True)
    write_result("precision" if device == "cpu" else "precision_cuda", result, asked.out)


if __name__ == "__main__":
    main()
