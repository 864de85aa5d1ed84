"""Reading pictures in processes: images a second in one process and in all, for each kind of file.

JPEG, PNG and TIFF of 200x150, and slices of CT with 12 bits in JPEG 2000 as DICOM, are decoded and prepared as `embed`
does, without a network: EfficientNet-Lite0's preparation, or DINOv2's, which sends four times the bytes. One process
is the caller's own thread. Both are timed in turns, with the processes running already; their start stands by itself.

    python -m benchmarks.decoding --images FOLDER_OF_JPEGS
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from joblib import cpu_count
from PIL import Image

from benchmarks.embedding import drawn_jpegs
from benchmarks.records import conditions, record, write_result
from embeddings.canary import draw
from embeddings.decoding import Decoders, Load, Prepare
from embeddings.encoders.efficientnet import EfficientNetLite0
from embeddings.encoders.preparation import Preparation
from embeddings.readers.dicom import read_frame
from embeddings.readers.images import read_image

GOAL = 1.8
_BATCH = 16


def preparations() -> dict[str, Prepare]:
    """What the two kinds of encoders do with a picture."""
    from transformers import BitImageProcessorPil

    sizes: dict[str, Any] = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    dinov2 = Preparation(BitImageProcessorPil(**sizes)).in_bytes([draw()])
    return {"efficientnet-lite0": EfficientNetLite0.prepare, "dinov2": dinov2}


def ct_slices(folder: Path, count: int) -> Iterator[Path]:
    """Write slices of 512x512 with 12 bits, compressed by JPEG 2000 without loss."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:512, :512] - 256.0
    for number in range(count):
        body = 1000.0 * (np.hypot(x / 1.2, y) < 180) + 300.0 * (np.hypot(x - number, y) < 60)
        slice_ = Dataset()
        slice_.file_meta = FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[str(number)])
        slice_.Rows = slice_.Columns = 512
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 12, 11, 0
        slice_.RescaleIntercept, slice_.RescaleSlope = -1024, 1
        slice_.WindowCenter, slice_.WindowWidth = 40, 400
        slice_.PixelData = (body + rng.normal(0, 12, body.shape) + 24).clip(0, 4095).astype(np.uint16).tobytes()
        slice_.compress(JPEG2000Lossless)
        path = folder / f"{number:05d}.dcm"
        slice_.save_as(path, enforce_file_format=True)
        yield path


def loads_of_kinds(jpegs: list[Path], folder: Path, slices: int) -> dict[str, list[Load]]:
    """The same pictures as JPEG, PNG and TIFF files, and slices of CT."""
    kinds: dict[str, list[Load]] = {"jpeg": [partial(read_image, path, path.name) for path in jpegs]}
    for suffix in ("png", "tiff"):
        kinds[suffix] = []
        for path in jpegs:
            target = folder / f"{path.stem}.{suffix}"
            Image.open(path).save(target)
            kinds[suffix].append(partial(read_image, target, target.name))
    kinds["ct-jpeg-2000"] = [partial(read_frame, path, path.name) for path in ct_slices(folder, slices)]
    return kinds


def seconds(decoders: Decoders, loads: list[Load], threads: int) -> float:
    """Wall seconds of reading them all, in batches."""
    batches = [loads[start : start + _BATCH] for start in range(0, len(loads), _BATCH)]
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        failed = sum(answer.row is None for answers in pool.map(decoders.read, batches) for answer in answers)
        spent = time.perf_counter() - start
    if failed:
        raise RuntimeError(f"{failed} pictures could not be read")
    return spent


def measure(loads: list[Load], prepare: Prepare, processes: int, turns: int) -> dict[str, Any]:
    """Images a second in one process and in several, in turns, and the ratio of each pair."""
    began = time.perf_counter()
    with Decoders(prepare, processes) as several, Decoders(prepare, 1) as one:
        several.read(loads[:1])
        started = time.perf_counter() - began
        seconds(several, loads[: 2 * _BATCH * processes], processes)
        pairs = [(seconds(one, loads, 1), seconds(several, loads, processes)) for _ in range(turns)]
    ratios = [alone / together for alone, together in pairs]
    rates = [round(len(loads) / statistics.median(spent), 1) for spent in zip(*pairs, strict=True)]
    return {
        "images": len(loads),
        "images_per_second": {"one_process": rates[0], "all_processes": rates[1]},
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "start_seconds": round(started, 2),
    }


def main() -> None:
    """Measure, print, and write results/decoding.json beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; without it they are drawn")
    parser.add_argument("--count", type=int, default=2_000, help="pictures of each kind")
    parser.add_argument("--slices", type=int, default=200, help="slices of CT")
    parser.add_argument("--processes", type=int, default=cpu_count())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    result: dict[str, Any] = {**conditions(), "processes": asked.processes, "turns": asked.turns, "kinds": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        given = None if asked.images is None else sorted(asked.images.glob("*.jpg"))[: asked.count]
        kinds = loads_of_kinds(given or list(drawn_jpegs(folder, asked.count)), folder, asked.slices)
        for (kind, loads), (name, prepare) in itertools.product(kinds.items(), preparations().items()):
            found = measure(loads, prepare, asked.processes, asked.turns)
            result["kinds"][f"{kind}, {name}"] = found
            print(f"{kind}, {name}: {found['images_per_second']}, {found['ratio']} x", flush=True)
    ratios = {name: float(found["ratio"]) for name, found in result["kinds"].items()}
    slowest = min(ratios, key=lambda name: ratios[name])
    if asked.processes == 2:
        least = ratios[slowest]
        result["goal"] = record(f"two processes over one, {slowest}", least, f">= {GOAL}", "ratio", least >= GOAL)
    write_result("decoding", result, asked.out)


if __name__ == "__main__":
    main()
