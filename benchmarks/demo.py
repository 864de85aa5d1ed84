"""The demonstration, run several times: its scores, time and memory, as medians with their spread.

Each run is `fedhypevae demo` in a process of its own, in a folder of its own; the first one of all also embeds the
images. Memory is what all its processes hold together (proportional set size, so that shared pages count once).

    python -m benchmarks.demo --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.durable import write_atomically

RESULTS = Path(__file__).parent / "results"
_KINDS = ("local_only", "statistics_only", "synthetic_only", "mixed", "own_lambda")
_MEASURES = ("accuracy", "balanced_accuracy")
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


def run_once(home: Path) -> tuple[dict[str, Any], float, float]:
    """One demonstration: its summary, its seconds, and the most memory in MiB that its processes held together.

    Raises:
        RuntimeError: the command failed; its last words are the text.
    """
    command = [sys.executable, "-m", "deploy.cli", "demo"]
    environment = {**os.environ, "FEDHYPEVAE_HOME": str(home), "FLWR_HOME": str(home / ".flwr")}
    started, peak = time.monotonic(), 0.0
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(command, env=environment, stdout=words, stderr=subprocess.STDOUT)
        mark = f"FEDHYPEVAE_HOME={home}".encode()
        while process.poll() is None:
            peak = max(peak, sum(_memory(pid) for pid in _members(mark)))
            time.sleep(0.5)
        seconds = time.monotonic() - started
        if process.returncode != 0:
            words.seek(0)
            raise RuntimeError(words.read()[-2000:])
    summary = json.loads((home / "outputs" / "demo" / "summary.json").read_text(encoding="utf-8"))
    return summary, seconds, peak


def collect(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of several runs: kind -> measure -> median, lowest and highest; each a mean over sites."""
    return {
        kind: {name: spread([one["scores"][kind][name] for one in summaries]) for name in _MEASURES} for kind in _KINDS
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of some numbers."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _members(mark: bytes) -> Iterator[int]:
    """Processes that were started with this home: Flower's daemons leave the tree of the command."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
        except OSError:
            continue


def _memory(pid: int) -> float:
    try:
        found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def main() -> None:
    """Run, collect, write the JSON and the picture of the last run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs with the images embedded already, beside the first")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        runs = []
        for number in range(1 + options.runs):
            runs.append(run_once(home))
            print(f"run {number}: {runs[-1][1]:.0f} s, {runs[-1][2]:.0f} MiB", flush=True)
        shutil.copy(home / "outputs" / "demo" / "embeddings.png", options.out.with_name("demo.png"))
    summaries = [summary for summary, _, _ in runs]
    spent = [max(one["privacy"]["epsilon_spent_per_site"].values()) for one in summaries]
    report = {
        "conditions": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.processor() or platform.machine(),
            "load_average_at_start": round(load, 1),
            "runs": len(runs),
        },
        "scores": collect(summaries),
        "epsilon_spent": spread(spent),
        "seconds_with_embedding": runs[0][1],
        "seconds": spread([seconds for _, seconds, _ in runs[1:]]),
        "peak_memory_mib": spread([peak for _, _, peak in runs]),
        "bytes_up_per_site": summaries[-1]["bytes_up_per_site"],
        "bytes_down_per_site": summaries[-1]["bytes_down_per_site"],
    }
    write_atomically(options.out, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
