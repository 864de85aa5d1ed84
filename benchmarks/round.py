"""What a round of ten sites costs over Flower's own floor: a do-nothing app with the same bytes that imports torch.

Two measurements. *A message*: Flower starts a fresh process for every message, so a site's part is that of a fresh
process that imports the app, reads the message, and answers; both apps in turn, in processor seconds, with our part
divided up. *A round*: the real thing on loopback, one SuperLink and ten SuperNodes as processes, each app a run of its
own on the same nodes; and both apps in Flower's simulation engine. Without TLS: keys and certificates cost both alike.

    python -m benchmarks.round --rounds 4
    python -m benchmarks.round --only messages
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.loopback import loopback_rounds, simulated_rounds
from benchmarks.message_cost import SETTINGS, declare, make_messages, make_sites
from benchmarks.records import conditions, write_result

SITES = 10


def message_costs(work: Path, turns: int) -> dict[str, Any]:
    """Processor seconds of a fresh process for one training message: floor and ours in turn."""
    sites = make_sites(work / "sites", turns + 1)
    statistics_message, path = make_messages(work)
    declare(statistics_message, sites)
    spent: dict[str, list[float]] = {"floor": [], "ours": []}
    parts: dict[str, list[float]] = {}
    for turn, site in enumerate(sites):
        for app, seen in spent.items():
            words = [sys.executable, "-m", "benchmarks.message_cost", app, str(path), str(site)]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **_ENVIRONMENT})
            if turn == 0:
                continue  # reads the files from the disk once
            answer = json.loads(done.stdout.splitlines()[-1])
            seen.append(answer.pop("whole"))
            if app == "ours":
                for name, seconds in answer.items():
                    parts.setdefault(name, []).append(seconds)
    over = [ours / floor - 1 for ours, floor in zip(spent["ours"], spent["floor"], strict=True)]
    return {
        "turns": turns,
        "floor_cpu_seconds": round(statistics.median(spent["floor"]), 3),
        "ours_cpu_seconds": round(statistics.median(spent["ours"]), 3),
        "over_floor": round(statistics.median(over), 3),
        "spread": [round(min(over), 3), round(max(over), 3)],
        "our_parts_cpu_seconds": {name: round(statistics.median(values), 4) for name, values in parts.items()},
    }


_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def run(rounds: int, turns: int, only: str | None, out: Path | None) -> None:
    """All parts, or one; each is written when it is done."""
    result: dict[str, Any] = {**conditions(), "sites": SITES, "settings": SETTINGS}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if only in (None, "messages"):
            result["message"] = message_costs(work, turns)
            print(json.dumps(result["message"]), flush=True)
            write_result("round", result, out)
        for key, measure in (("loopback", loopback_rounds), ("simulation", simulated_rounds)):
            if only in (None, key):
                start = time.monotonic()
                result[key] = measure(work / key, SITES, rounds)
                result[key]["took_seconds"] = round(time.monotonic() - start, 1)
                print(json.dumps({key: result[key]}), flush=True)
                write_result("round", result, out)


def main() -> None:
    """Measure, print, and write results/round.json beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=7, help="messages of each app")
    parser.add_argument("--only", choices=["messages", "loopback", "simulation"])
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    run(asked.rounds, asked.turns, asked.only, asked.out)


if __name__ == "__main__":
    main()
