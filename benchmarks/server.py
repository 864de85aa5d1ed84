"""How a round grows with the number of sites: in the plain loop, at the server alone, in Flower's simulation engine.

The plain loop runs whole rounds, sites included, with 10 to 10,000 sites of 32 records; its processor time a site and
round should not depend on their number. The server alone takes in uploads of the default model at width 768, made as
they come, and steps; its memory should not grow. Flower's engine runs 10 and 100 sites on Ray, where asked for.

    python -m benchmarks.server --engine 10 100
    python -m benchmarks.server --sites --engine 1000 --out benchmarks/results/engine.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.records import conditions, write_result
from common.config.presets import resolve
from common.config.run import RunConfig, Scalar
from common.loop import run_loop
from common.methods import get_method
from common.methods.base import Problem, RunContext, ServerState
from common.methods.uploads import gather
from common.records import SiteData

LOOP_SITES = (10, 100, 1_000, 10_000)
ENGINE_SITES = (10, 100)
DIM, CLASSES, RECORDS = 768, 11, 32
_LOOP_DIM = 64
_SETTINGS: dict[str, Scalar] = {
    "noise": "test",
    "meta-steps": 0,
    "spare-rounds": 0,
    "encoder-width": 8,
    "sleep-steps": 1,
}
_ENGINE_LIMIT_S = 240.0  # of a round, with a second more for each site from there on


def made_records(count: int, dim: int) -> SiteData:
    """Unit-norm rows with labels in turn."""
    generator = torch.Generator().manual_seed(0)
    rows = functional.normalize(torch.randn(count, dim, generator=generator), dim=1)
    return SiteData(rows, torch.arange(count) % CLASSES)


def loop_cost(sites: int, rounds: int) -> float:
    """Processor seconds of the rounds of a run in the plain loop; what comes before and after them is left out."""
    config = RunConfig.from_flat({**_SETTINGS, "num-sites": sites, "num-rounds": rounds + 1})
    marks: list[float] = []

    def note(round_index: int, state: ServerState) -> None:
        del round_index, state
        marks.append(time.process_time())

    names = tuple(f"class-{index}" for index in range(CLASSES))
    run_loop(config, [made_records(RECORDS, _LOOP_DIM)] * sites, names, note)
    return marks[-1] - marks[0]


def loop_costs(counts: Sequence[int], site_rounds: int = 3_000, repeats: int = 3) -> list[dict[str, Any]]:
    """Milliseconds a site and round, for numbers of sites in turn: about as many site rounds at each, or one round."""
    found: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(repeats):
        for count in counts:
            if turn and count > site_rounds:
                continue  # ten thousand steps are an average already
            rounds = max(1, min(site_rounds // count, 50))
            found[count].append(1e3 * loop_cost(count, rounds) / (count * rounds))
    return [
        {
            "sites": count,
            "milliseconds_per_site_round": round(statistics.median(values), 4),
            "spread": [round(min(values), 4), round(max(values), 4)],
        }
        for count, values in found.items()
    ]


def server_alone(sites: int) -> dict[str, float]:
    """One server step over uploads of the default model that come one by one, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.server", "--child", str(sites)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _child(sites: int) -> None:
    torch.set_num_threads(1)
    config = RunConfig.from_flat({**_SETTINGS, "num-sites": sites, "num-rounds": 1, "epsilon": float("inf")})
    method = get_method(config.method)
    names = tuple(f"class-{index}" for index in range(CLASSES))
    context = RunContext(config, Problem(DIM, names, sites), method.plan(config))
    state, shapes = method.init(context), method.upload_shapes(context)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    uploads = gather(method, context, state)
    for site in range(sites):
        uploads[site] = {name: torch.full(shape, 1e-3) for name, shape in shapes.items()}
    method.server_step(context, state, uploads)
    spent = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = {
        "sites": sites,
        "microseconds_per_site": round(1e6 * spent / sites, 1),
        "memory_beyond_start_mib": round((peak - before) / 1024, 1),
        "peak_memory_mib": round(peak / 1024, 1),
    }
    print(json.dumps(answer))


def engine(sites: int, rounds: int, work: Path) -> dict[str, Any]:
    """Seconds a round in Flower's simulation engine on Ray, from the run's own records."""
    from deploy.simulation.simulate import simulate

    folder = work / f"engine-{sites}"
    folder.mkdir(parents=True)
    pool = _pool(work, 60 * sites)
    settings: dict[str, Scalar] = {
        "num-sites": sites,
        "min-sites": sites,
        "num-rounds": rounds,
        "pool": str(pool),
        "output-dir": "outputs/run",
        "tracking": "off",
        "synthetic-rows": 110,
        "meta-steps": 0,
        "round-timeout": max(_ENGINE_LIMIT_S, float(sites)),
    }
    start = time.monotonic()
    output = simulate(resolve(settings), work_folder=folder, app_folder=Path(__file__).resolve().parents[1])
    whole = time.monotonic() - start
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    each = [entry["seconds"] for entry in summary["history"]]
    return {
        "sites": sites,
        "rounds": rounds,
        "seconds_each": [round(one, 2) for one in each],
        "seconds_per_round": round(statistics.median(each[1:] or each), 2),
        "milliseconds_per_site_round": round(1e3 * statistics.median(each[1:] or each) / sites, 1),
        "seconds_whole": round(whole, 1),
    }


def _pool(work: Path, rows: int) -> Path:
    """A file of made-up embeddings to be divided among the sites."""
    import numpy as np

    from common.wire.identity import EncoderIdentity
    from embeddings.store.sets import EmbeddingSet, SetMetadata
    from embeddings.store.writing import write_store

    names = tuple(f"class-{index}" for index in range(CLASSES))
    data = made_records(rows, DIM)
    identity = EncoderIdentity("made-up", "1", DIM, "none", "0" * 64, "float32", names)
    path = work / f"pool-{rows}.parquet"
    write_store(
        path, EmbeddingSet(data.embeddings.numpy(), data.labels.numpy().astype(np.int64), SetMetadata(identity))
    )
    return path


def run(engine_sites: Sequence[int], loop_sites: Sequence[int], repeats: int, out: Path | None) -> dict[str, Any]:
    """All three measurements; what is there is written before Flower's engine begins."""
    torch.set_num_threads(1)
    result: dict[str, Any] = conditions()
    if loop_sites:
        result["loop"] = loop_costs(loop_sites, repeats=repeats)
        result["server_alone"] = [server_alone(count) for count in loop_sites]
    result["engine"] = []
    write_result("server", result, out)
    with tempfile.TemporaryDirectory() as work:
        for count in engine_sites:
            result["engine"].append(engine(count, 3, Path(work)))
            write_result("server", result, out)
    return result


def main() -> None:
    """Measure, print, and write results/server.json beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=int, nargs="*", default=list(ENGINE_SITES), help="sites on Flower's engine")
    parser.add_argument("--sites", type=int, nargs="*", default=list(LOOP_SITES), help="sites in the plain loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    if asked.child is not None:
        _child(asked.child)
        return
    result = run(asked.engine, asked.sites, asked.repeats, asked.out)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
