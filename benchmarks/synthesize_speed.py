"""What a million rows of 768 coordinates cost in time and memory: `fedhypevae synthesize` in a process of its own.

Two threads; the default model with 11 classes that overlap and lean to one side as a private run's do, so that the
balance takes further draws. The parts are timed apart: drawing, drawing and labelling by the generator's own posterior,
that with the classes balanced, and writing rows that are there already.

    python -m benchmarks.synthesize_speed --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.publishing.bundle import Bundle, load_bundle
from common.publishing.generator_file import write_generator
from common.publishing.parquet import write_rows
from common.wire.identity import EncoderIdentity

DIM, CLASSES, THREADS = 768, 11, 2
_PART_ROWS = 65_536
_APART, _LEAN = 45.0, 6.0  # as in the demonstration: 0.4 of the rows get the class asked for, classes differ fivefold


def make_generator(folder: Path, **settings: str | int | float | bool) -> Path:
    """A generator's file with the default model at width 768, as a run would publish it before its first round."""
    config, names = RunConfig.from_flat({"meta-steps": 0, **settings}), tuple(f"class-{k}" for k in range(CLASSES))
    method = get_method(config.method)
    context = RunContext(config, Problem(DIM, names, config.federation.num_sites), method.plan(config))
    encoder = EncoderIdentity("made-up", "1", DIM, "none", "0" * 64, "float32", names)
    path = folder / "generator.safetensors"
    artifact = method.finish(context, method.init(context))
    write_generator(path, context, replace(artifact, tensors={**artifact.tensors, **_classes()}), encoder)
    return path


def _classes() -> dict[str, Tensor]:
    """Classes that overlap and lean to one side, as a private run's: much of what is asked for comes out otherwise."""
    means = torch.randn(DIM, CLASSES, generator=torch.Generator().manual_seed(0))
    return {
        "decoder.0.class_weight": _APART * means / DIM**0.5,
        "class_bias.weight": _LEAN * torch.linspace(1.0, -1.0, CLASSES),
    }


def synthesize(generator: Path, rows: int, out: Path) -> dict[str, float]:
    """Run the command in a process of its own: wall and processor seconds, peak memory in MiB, and MB written."""
    code = "import sys; from deploy.cli import main; main()"
    words = ["synthesize", str(generator), "--rows", str(rows), "--out", str(out), "--threads", str(THREADS)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL, env={**os.environ})
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "wall_seconds": round(wall, 1),
        "processor_seconds": round(processor, 1),
        "peak_memory_mib": round(after.ru_maxrss / 1024),
        "megabytes": round(out.stat().st_size / 1e6),
    }


def _counts(file: Path) -> list[int]:
    labels = pq.read_table(file, columns=["label"]).column("label").to_numpy()
    return np.bincount(labels, minlength=CLASSES).tolist()


def parts(folder: Path) -> dict[str, float]:
    """Processor seconds of each part for 65,536 rows, in this process."""
    labelled = load_bundle(make_generator(folder / "labelled"))

    def draw(bundle: Bundle, as_drawn: bool = True) -> Callable[[], object]:
        sample = partial(bundle.sample, _PART_ROWS, threads=THREADS, as_drawn=as_drawn)
        return lambda: sum(len(labels) for _, labels in sample())

    blocks = list(labelled.sample(_PART_ROWS))
    names = labelled.class_names
    ways: dict[str, Callable[[], object]] = {
        "draw_and_label": draw(labelled),
        "draw_label_and_balance": draw(labelled, as_drawn=False),
        "write": lambda: write_rows(folder / "rows.parquet", blocks, dim=DIM, class_names=names, notes={}),
    }
    found = {}
    for name, way in ways.items():
        way()
        start = time.process_time()
        way()
        found[name] = round(time.process_time() - start, 2)
    return found


def main() -> None:
    """Measure, print, and write results/synthesize_speed.json beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {
            "rows": rows,
            "dim": DIM,
            "threads": THREADS,
            "torch": torch.__version__,
            "load_average_before": round(os.getloadavg()[0], 1),
            "whole": synthesize(make_generator(folder), rows, folder / "all.parquet"),
            "class_counts": _counts(folder / "all.parquet"),
            "class_counts_as_drawn": load_bundle(folder).draw(_PART_ROWS, as_drawn=True)[1].bincount().tolist(),
            "processor_seconds_of_65536_rows": parts(folder),
        }
    target = Path(__file__).parent / "results" / "synthesize_speed.json"
    partial = target.with_suffix(".json.part")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(target)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
