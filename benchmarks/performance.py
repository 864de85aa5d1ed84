"""The performance measurements beside their goals: `make bench-performance`.

Runs the scripts one after the other, each in a process of its own, reads what they wrote, and prints and writes
`results/performance.json`. A part that fails, or for which no time is left, stands there as not met, with the reason.

    python -m benchmarks.performance
    python -m benchmarks.performance --only step round     # the others as they were last measured
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.performance_pictures import draw_pictures
from benchmarks.records import RESULTS, gpu_name, record, write_result

Records = list[dict[str, Any]]
_WHOLE_S = 19.5 * 60


def step_records(step: Mapping[str, Any]) -> Records:
    """Time and memory of the private step: the worst size of all, and the least lead over Opacus' best."""
    sizes = step["sizes"]

    def of(size: Mapping[str, Any]) -> str:
        return f"{size['decoder']} decoder, d {size['dim']}, batch {size['batch']}"

    slow = max(sizes, key=lambda size: size["ways"]["private"]["ratio_to_plain"])
    ratio = slow["ways"]["private"]["ratio_to_plain"]
    over = [of(size) for size in sizes if size["ways"]["private"]["ratio_to_plain"] > 1.3]
    big = max(sizes, key=lambda size: size["ways"]["private"]["memory_to_plain"])
    memory = big["ways"]["private"]["memory_to_plain"]
    tight = min(sizes, key=lambda size: size["faster_than_opacus_best"])
    lead, where = tight["faster_than_opacus_best"], f"at {of(tight)}"
    drawn = step["million_normals_a_second"]
    spread = slow["ways"]["private"]["ratio_quartiles"]
    why = f"worst at {of(slow)}; above the goal at {len(over)} of {len(sizes)} sizes" if over else f"at {of(slow)}"
    return [
        record("private step: time", ratio, "<= 1.3", "times the plain step", ratio <= 1.3, spread=spread, reason=why),
        record("private step: memory", memory, "<= 1.2", "times the plain step", memory <= 1.2, reason=f"at {of(big)}"),
        record("private step: lead over Opacus' best", lead, "> 1", "times as fast", lead > 1, reason=where),
        record(
            "drawing noise",
            drawn["secure"],
            "reported apart",
            "million normals/s",
            True,
            reason=f"NumPy's SFC64: {drawn['numpy_sfc64']}",
        ),
    ]


def round_records(found: Mapping[str, Any]) -> Records:
    """Our part of a round over Flower's floor: loopback, simulation, and the processor time of one message."""
    rows = []
    names = {"loopback": "over real processes", "cold": "the same, by fresh processes", "simulation": "in simulation"}
    parts = {**found, "cold": found["loopback"]["cold"]} if "loopback" in found else found
    for key, name in names.items():
        if key not in parts:
            why = "not measured within the time"
            rows.append(record(f"round of ten sites {name}: our part", 0.0, "< 0.15", "", False, reason=why))
        else:
            part, goal = parts[key], "< 0.15" if key == "loopback" else "reported"
            met = part["over_floor"] < 0.15 or key != "loopback"
            why = f"seconds a round: ours {part['ours_seconds']}, floor {part['floor_seconds']}"
            rows.append(
                record(
                    f"round of ten sites {name}: our part",
                    part["over_floor"],
                    goal,
                    "of the floor",
                    met,
                    spread=part["spread"],
                    reason=why,
                )
            )
    if "message" not in found:
        return rows
    part = found["message"]
    why = f"{part['ours_cpu_seconds']} s against {part['floor_cpu_seconds']} s of a fresh process"
    unit = "of the floor's processor time"
    value = part["over_floor"]
    rows.append(record("one message: our part", value, "reported", unit, True, spread=part["spread"], reason=why))
    return rows


def bytes_records(found: Mapping[str, Any]) -> Records:
    """Bytes beside the paper's decoder, the worse way and size."""
    share = max(row[f"{way}_of_paper_decoder"] for row in found["sizes"] for way in ("bytes_up", "bytes_down"))
    name = "bytes: of the paper's decoder by FedAvg"
    return [record(name, share, "<= 0.05", "of its bytes", share <= 0.05)]


def server_records(server: Mapping[str, Any]) -> Records:
    """Cost of a site and round from 100 sites to the most, and the server's memory."""
    rows = [row for row in server["loop"] if row["sites"] >= 100]
    costs = [row["milliseconds_per_site_round"] for row in rows]
    apart = max(costs) / min(costs) - 1
    alone = server["server_alone"]
    grown = max(row["memory_beyond_start_mib"] for row in alone) - alone[0]["memory_beyond_start_mib"]
    found = [
        record(
            f"site-round in the plain loop, {rows[0]['sites']} to {rows[-1]['sites']} sites",
            round(apart, 3),
            "<= 0.10",
            "difference",
            apart <= 0.10,
            spread=[min(costs), max(costs)],
            reason=f"milliseconds: {costs}",
        ),
        record("server's memory, most sites against ten", round(grown, 1), "no growth", "MiB more", grown <= 8),
    ]
    return found + engine_records(server)


def engine_records(server: Mapping[str, Any]) -> Records:
    """Cost of a site and round in Flower's simulation engine."""
    rows = []
    for row in server["engine"]:
        each, why = row["milliseconds_per_site_round"], f"{row['seconds_per_round']} s a round"
        rows.append(
            record(f"Flower's engine, {row['sites']:,} sites", each, "reported", "ms a site-round", True, reason=why)
        )
    return rows


def whole_records(whole: Mapping[str, Any]) -> Records:
    """A paper-sized run against the same loop without privacy."""
    why = f"{whole['rounds_timed']} rounds of each timed; 50 private rounds take {whole['seconds_of_50_rounds']} s"
    ratio = whole["ratio"]
    unit = "times the loop without privacy"
    return [record("paper-sized run", ratio, "<= 1.4", unit, ratio <= 1.4, spread=whole["spread"], reason=why)]


def sampling_records(speed: Mapping[str, Any]) -> Records:
    """Rows a minute of `fedhypevae synthesize`, by the wall clock."""
    seconds = speed["whole"]["wall_seconds"]
    rate = round(speed["rows"] / seconds * 60)
    why = f"{speed['whole']['processor_seconds']} processor seconds, load {speed['load_average_before']} at the start"
    return [record("sampling", rate, ">= 1000000", "rows a minute", rate >= 1_000_000, reason=why)]


# name -> (result's file, command, most seconds, reader)
PARTS: dict[str, tuple[str, list[str], float, Callable[[Mapping[str, Any]], Records]]] = {
    "step": ("step_cost", ["benchmarks.step_cost", "--seconds", "3"], 420, step_records),
    "round": ("round", ["benchmarks.round", "--rounds", "4"], 600, round_records),
    "bytes": ("message_bytes", ["benchmarks.message_bytes"], 60, bytes_records),
    "server": ("server", ["benchmarks.server"], 420, server_records),
    # five minutes more than the twenty have, so it is run by itself: `make bench-engine`
    "engine": ("engine", [], 0, engine_records),
    "whole": ("whole", ["benchmarks.whole", "--rounds", "1", "--turns", "3"], 240, whole_records),
    "sampling": ("synthesize_speed", ["benchmarks.synthesize_speed"], 150, sampling_records),
}


def measure(part: str, left: float) -> str:
    """Run one part's script; returns why there is no new result, or nothing."""
    _, command, most, _ = PARTS[part]
    if not command:
        return ""
    limit = min(most, left)
    if limit < 30:
        return "no time was left of the twenty minutes"
    words = [sys.executable, "-m", *command]
    with tempfile.TemporaryFile() as errors:  # torch's profiler writes hundreds of lines there
        trouble = _finish(
            subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True), limit
        )
        if trouble:
            errors.seek(0)
            print(errors.read()[-3000:].decode(errors="replace"), file=sys.stderr)
    return trouble


def _finish(process: subprocess.Popen[bytes], limit: float) -> str:
    """Wait for a script, end it if it takes too long; returns what went wrong, or nothing."""
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it ends the nodes that it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not done after {limit:.0f} s"
    return f"its script ended with exit code {code}" if code else ""


def collect(part: str, trouble: str, folder: Path = RESULTS) -> Records:
    """A part's records from its result, or one that says why there is none."""
    name, _, _, read = PARTS[part]
    path = folder / f"{name}.json"
    if not path.is_file():
        return [record(part, 0.0, "", "", False, reason=trouble or f"no results/{name}.json: its script was not run")]
    rows = read(json.loads(path.read_text(encoding="utf-8")))
    if trouble:
        for row in rows:
            row["reason"] = f"an earlier figure, since this time: {trouble}. {row.get('reason', '')}".strip()
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The records as lines."""
    width = max(len(row["name"]) for row in rows)
    return "\n".join(
        f"{'met    ' if row['met'] else 'NOT MET'} {row['name']:{width}s} {row['value']:>10} {row['unit']}"
        f" (goal {row['goal'] or '-'}){'  ' + row['reason'] if row.get('reason') else ''}"
        for row in rows
    )


def main() -> None:
    """Measure, print, and write results/performance.json and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="parts to measure anew")
    chosen = parser.parse_args().only
    end, rows = time.monotonic() + _WHOLE_S, list[dict[str, Any]]()
    for part in PARTS:
        started = time.monotonic()
        trouble = measure(part, end - started) if part in chosen else ""
        mine = collect(part, trouble)
        rows += mine
        print(f"-- {part}, {time.monotonic() - started:.0f} s\n{show(mine)}", flush=True)
    write_result("performance", rows)
    draw_pictures(RESULTS)
    met = sum(row["met"] for row in rows)
    print(f"{met} of {len(rows)} met, on the processor; GPU: {gpu_name()}. See benchmarks/results/performance.json")


if __name__ == "__main__":
    main()
