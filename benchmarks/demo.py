"""The demonstration, run several times: its scores, time and memory, as medians with their spread.

Each run is `fedhypevae demo` in a process of its own, with a seed of its own for the division into hospitals and the
first weights; the first one also embeds the images. Memory is what all its processes hold together (proportional
set size, so that shared pages count once).

    python -m benchmarks.demo --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
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
SEED = 2026  # the first run is the demonstration as it stands
_KINDS = ("local_only", "statistics_only", "synthetic_only", "mixed", "own_lambda")
_MEASURES = ("accuracy", "balanced_accuracy")
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


def run_once(home: Path, seed: int) -> tuple[Path, float, float]:
    """One demonstration: its folder, its seconds, and the most memory in MiB that its processes held together.

    Raises:
        RuntimeError: the command failed; its last words are the text.
    """
    command = [sys.executable, "-m", "deploy.cli", "demo", "--set", f"seed={seed}"]
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
    return home / "outputs" / "demo", seconds, peak


def read(path: Path) -> Any:
    """A JSON file of a run."""
    return json.loads(path.read_text(encoding="utf-8"))


def collect(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of several runs: kind -> measure -> median, lowest and highest; each a mean over sites."""
    return {
        kind: {name: spread([one["scores"][kind][name] for one in summaries]) for name in _MEASURES} for kind in _KINDS
    }


def gain(homes: Sequence[Sequence[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Balanced accuracy of several runs, means over hospitals: on whose patients, alone and with the set -> spread."""
    return {
        f"{patients}, {model}": spread([statistics.mean(one[model][patients] for one in home) for home in homes])
        for patients in ("own_patients", "all_patients")
        for model in ("alone", "with_set")
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
    """Run, collect, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="runs, each with another seed; the first embeds the images")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        runs, summaries, homes = [], [], []
        for number in range(options.runs):
            runs.append(run_once(home, SEED + number))
            folder, seconds, peak = runs[-1]
            summaries.append(read(folder / "summary.json"))
            homes.append(read(folder / "take_home.json"))
            print(f"run {number}: {seconds:.0f} s, {peak:.0f} MiB", flush=True)
    spent = [max(one["privacy"]["epsilon_spent_per_site"].values()) for one in summaries]
    report = {
        "conditions": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.processor() or platform.machine(),
            "load_average_at_start": round(load, 1),
            "runs": len(runs),
        },
        "scores": collect(summaries),
        "balanced_accuracy": gain(homes),
        "epsilon_spent": spread(spent),
        "seconds_with_embedding": runs[0][1],
        "seconds": spread([seconds for _, seconds, _ in runs[1:] or runs]),
        "peak_memory_mib": spread([peak for _, _, peak in runs]),
        "bytes_up_per_site": summaries[-1]["bytes_up_per_site"],
        "bytes_down_per_site": summaries[-1]["bytes_down_per_site"],
    }
    write_atomically(options.out, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
