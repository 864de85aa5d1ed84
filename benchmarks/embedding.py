"""Throughput of the embedding pipeline against the bare network, and its memory at 1,000 and 10,000 images.

    python -m benchmarks.embedding --images FOLDER_OF_JPEGS
    python -m benchmarks.embedding --device cuda      # embedding_cuda.json: throughput alone, DINOv2 by size

The pipeline reads JPEG files, decodes, prepares and embeds them; the bare network runs on tensors that were
prepared beforehand, in the faster of two ways (one pass per core with one thread each; one pass at a time
with all threads). On a GPU it is given what lies there already, and what lies on the host, and the other floor is
reading the files in all processes without a network; each pass ends with its rows on the host. All are timed in turns,
since a machine that is shared is now faster and now slower; CPU seconds, those of processes that read included, are
reported beside wall seconds for the same reason. DINOv2 has random weights: the arithmetic is the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image

from benchmarks.records import RESULTS, conditions, write_result
from common.devices import choose_device
from embeddings.decoding import Decoders
from embeddings.encoders.base import Encoder, EncoderOptions, Precision
from embeddings.encoders.load import load_encoder
from embeddings.encoders.preparation import on_device
from embeddings.pipeline import Item, embed_batches
from embeddings.readers.images import read_image

_HELD = 4_096  # images whose inputs are held
# Dense bfloat16 peak of the card that the GPU figures are for, in floating-point operations a second.
PEAK_BF16 = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
# What is timed on a GPU: size and arithmetic.
ON_GPU: tuple[tuple[str, Precision], ...] = (
    ("small", "bfloat16"), ("base", "bfloat16"), ("base", "float32"), ("large", "bfloat16")
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Images, wall seconds and CPU seconds of one turn."""

    images: int
    wall: float
    cpu: float


def timed(work: Callable[[], int]) -> Timing:
    """Run `work`, which returns the number of images it embedded."""
    wall, cpu = time.perf_counter(), processor_seconds()
    images = work()
    return Timing(images, time.perf_counter() - wall, processor_seconds() - cpu)


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


def bare_all_threads(encoder: Encoder, batches: list[np.ndarray]) -> int:
    """One forward pass at a time, with torch's own number of threads."""
    for batch in batches:
        encoder.forward(batch)
    return sum(len(batch) for batch in batches)


def bare_per_core(encoder: Encoder, batches: list[np.ndarray], passes: int) -> int:
    """So many forward passes at once, on a processor one per core, each on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    queue = iter(batches)
    lock = threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                batch = next(queue, None)
            if batch is None:
                return
            encoder.forward(batch)

    threads = [threading.Thread(target=worker) for _ in range(passes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    return sum(len(batch) for batch in batches)


def pipeline(encoder: Encoder, files: list[Path]) -> int:
    """Files to embeddings, as the command does."""
    items = (Item(path.name, partial(read_image, path, path.name), 0) for path in files)
    return sum(len(batch.items) for batch in embed_batches(items, encoder, processes=cpu_count()))


def reading(encoder: Encoder, files: list[Path]) -> int:
    """Files to the network's inputs in all processes, without a network."""
    loads = [partial(read_image, path, path.name) for path in files]
    batches = [loads[start : start + encoder.batch_size] for start in range(0, len(loads), encoder.batch_size)]
    with Decoders(encoder.prepare, cpu_count()) as decoders, ThreadPoolExecutor(cpu_count()) as pool:
        return sum(len(answers) for answers in pool.map(decoders.read, batches))


def throughput(encoder: Encoder, files: list[Path], turns: int) -> dict[str, Any]:
    """Time pipeline and bare network in turns on the same images."""
    size = encoder.batch_size
    files = files[: len(files) // size * size]
    prepared = [encoder.prepare(read_image(path, path.name)) for path in files[: _HELD // size * size or size]]
    batches = [np.stack(prepared[start : start + size]) for start in range(0, len(prepared), size)]
    ways: dict[str, Callable[[], int]] = {"pipeline": partial(pipeline, encoder, files)}
    if encoder.device == "cpu":
        ways["bare_per_core"] = partial(bare_per_core, encoder, batches, cpu_count())
        ways["bare_all_threads"] = partial(bare_all_threads, encoder, batches)
    else:
        there: list[Any] = [on_device(batch, encoder.device) for batch in batches]
        ways["bare_on_the_card"] = partial(bare_per_core, encoder, there, 2)
        ways["bare_from_the_host"] = partial(bare_per_core, encoder, batches, 2)
        ways["reading"] = partial(reading, encoder, files)
    timings: dict[str, list[Timing]] = {name: [] for name in ways}
    for work in ways.values():
        work()
    for _ in range(turns):
        for name, work in ways.items():
            timings[name].append(timed(work))
    rates = {name: statistics.median(one.images / one.wall for one in turn) for name, turn in timings.items()}
    per_cpu = {name: statistics.median(one.images / one.cpu for one in turn) for name, turn in timings.items()}
    bare = max(rate for name, rate in rates.items() if name.startswith("bare"))
    bare_cpu = max(rate for name, rate in per_cpu.items() if name.startswith("bare"))
    result: dict[str, Any] = {
        "encoder": encoder.name,
        "device": encoder.device,
        "precision": encoder.precision,
        "images": len(files),
        "batch_size": size,
        "turns": turns,
        "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "images_per_cpu_second": {name: round(rate, 2) for name, rate in per_cpu.items()},
        "pipeline_over_bare": round(rates["pipeline"] / bare, 3),
        "pipeline_over_bare_cpu_seconds": round(per_cpu["pipeline"] / bare_cpu, 3),
    }
    if encoder.device != "cpu":
        card = torch.cuda.get_device_name()
        result["pipeline_over_smaller_floor"] = round(rates["pipeline"] / min(bare, rates["reading"]), 3)
        flops = flops_per_image(encoder, batches[0])
        result |= {"card": card, "gigaflops_per_image": round(flops / 1e9, 2)}
        if card in PEAK_BF16:
            result["fraction_of_bf16_peak"] = round(rates["pipeline"] * flops / PEAK_BF16[card], 4)
    return result


def flops_per_image(encoder: Encoder, batch: np.ndarray) -> float:
    """Count the floating-point operations of one image (a multiplication and an addition count as two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        encoder.forward(batch)
    return float(counter.get_total_flops()) / len(batch)


def extraction(files: Path, count: int, encoder: str) -> dict[str, Any]:
    """Run an extraction of `count` images in a process of its own; report its rate and its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, __file__, "--child", str(files), str(count), folder, encoder]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def child(files: Path, count: int, folder: Path, encoder: str) -> None:
    """The process of `extraction`."""
    from embeddings.extract import extract
    from embeddings.pipeline import Listing

    network = load_encoder(encoder)
    names = sorted(path for path in files.iterdir() if path.suffix == ".jpg")[:count]
    items = tuple(
        Item(path.name, partial(read_image, path, path.name), number % 2, stamp=(path.name,))
        for number, path in enumerate(names)
    )
    memory_before = peak_memory()
    wall, cpu = time.perf_counter(), processor_seconds()
    listing = Listing(items, (), ("a", "b"))
    outcome = extract(listing, network, folder / "out.parquet", bytes(32), processes=cpu_count())
    wall, cpu = time.perf_counter() - wall, processor_seconds() - cpu
    found = {
        "images": outcome.rows,
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "images_per_second": round(outcome.rows / wall, 2),
        "peak_mebibytes": peak_memory(),
        "peak_mebibytes_before": memory_before,
    }
    print(json.dumps(found))


def peak_memory() -> float:
    """Return the most memory this process held so far, in MiB (what the parent held before does not count)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def random_dinov2(folder: Path, size: str) -> Path:
    """Save a DINOv2 with random weights, as a download would lie there."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    width, layers, heads = SIZES[size]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": 518}
    Dinov2Model(Dinov2Config(patch_size=14, **sizes)).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder


def drawn_jpegs(folder: Path, count: int) -> Iterator[Path]:
    """Write JPEG files of 200x150, where no real ones are given."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.cumsum(rng.integers(-3, 4, (150, 200, 3)), axis=1) + 128
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
        yield path


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEG files; without it they are drawn")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--turns", type=int, default=None, help="by default 5, on a GPU 2")
    parser.add_argument("--large", type=int, default=10_000, help="images of the larger extraction")
    parser.add_argument("--small", type=int, default=320, help="images of the small encoder's timing on a CPU")
    parser.add_argument("--only", choices=["throughput", "extraction"], help="measure one part, keep the other")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU")
    parser.add_argument("--count", type=int, default=16_384, help="files of a turn on a GPU, each again and again")
    options = parser.parse_args()
    gpu = choose_device(options.device).type != "cpu"
    out = options.out or RESULTS / ("embedding_cuda.json" if gpu else "embedding.json")
    turns = options.turns or (2 if gpu else 5)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.images
        if folder is None:
            folder = Path(scratch) / "images"
            folder.mkdir()
            list(drawn_jpegs(folder, _HELD if gpu else options.large))
        files = sorted(path for path in folder.iterdir() if path.suffix == ".jpg")
        report: dict[str, Any] = json.loads(out.read_text()) if options.only and out.is_file() else {}
        about = {**conditions(), "torch": torch.__version__, "images": "drawn" if options.images is None else "given"}
        if options.only != "extraction":
            cases: list[tuple[str, Precision, list[Path]]] = [
                ("efficientnet-lite0", "float32", files[: options.small]),
                ("small", "float32", files[: max(options.small // 8, 8)]),
            ]
            if gpu:
                again = list(itertools.islice(itertools.cycle(files), options.count))
                cases = [(size, precision, again) for size, precision in ON_GPU]
            results = []
            for name, precision, chosen in cases:
                model = str(random_dinov2(Path(scratch) / name, name)) if name in SIZES else name
                encoder = load_encoder(model, EncoderOptions(device=options.device, precision=precision))
                results.append({"size": name, **throughput(encoder, chosen, turns)})
                print(results[-1], flush=True)
            report["throughput"] = {"conditions": about, "results": results}
        if options.only != "throughput" and not gpu:
            counts = (1_000, min(options.large, len(files)))
            sizes = [extraction(folder, count, "efficientnet-lite0") for count in counts]
            print(sizes)
            report["extraction"] = {"conditions": about, "results": sizes}
    write_result("embedding", report, out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
    else:
        main()
