"""What fewer bits on the wire save, and what they cost in score: float32 against 16, 8 and 6 bits, same seeds.

    python -m benchmarks.compression
    python -m benchmarks.compression --methods fedhypevae_tied --seeds 7

Each run is one of the table's rows on organ-iid, with a seed that the table does not use. Bytes are those of the values
on the wire both ways, statistics and the first, whole parameters included, without headers. They stand beside what
float32 would send for the same messages, and beside FedAvg of the paper's DP-CVAE decoder over the same rounds. Runs
that are in `results/compression.json` are not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import score_trained, train
from benchmarks.protocol import Federation, load_federations
from benchmarks.reference import local_heads
from benchmarks.rows import ROWS, Row
from benchmarks.table import RESULTS, write_text
from common.evaluation.heads import LinearHead
from common.evaluation.scores import mean_scores

BITS = (32, 16, 8, 6)
SEEDS = (7, 8, 9)
METHODS = (("fedhypevae_tied", "local"), ("fedhypevae", "local"), ("fedhypevae_tied", "secagg"))
PAPER_DECODER = 357_632  # parameters of the DP-CVAE decoder with one-hot conditioning (d_x = 768, K = 11)
GOALS = {"below_float32": 4.0, "of_paper_decoder": 1 / 20}


def run_once(federation: Federation, own: Sequence[LinearHead], row: Row, bits: int) -> dict[str, Any]:
    """One record: scores in per cent and bytes of one method with one number of bits."""
    started = time.perf_counter()
    trained = train(federation, row, {"wire-bits": bits})
    scores = score_trained(federation, own, row, trained)
    rounds = trained.result.context.plan.num_rounds
    record: dict[str, Any] = {"method": row.method, "trust": row.trust, "bits": bits, "seed": federation.seed}
    record |= {"rounds": rounds, "bytes_up": round(trained.result.bytes_up)}
    record |= {"bytes_down": round(trained.result.bytes_down)}
    for name in ("synthetic_only", "mixed"):
        sites = scores[name]
        if sites is not None:
            mean = mean_scores(list(sites))
            record[name] = [round(100 * mean.accuracy, 2), round(100 * mean.balanced_accuracy, 2)]
    return {**record, "seconds": round(time.perf_counter() - started, 1)}


def compared(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method and number of bits: bytes against float32 and the paper's decoder, scores against float32.

    Differences of scores are means over the seeds of paired runs, in points, with the largest one by magnitude; the
    spread of float32 itself over the seeds stands beside them.
    """
    rows = []
    for method, trust in dict.fromkeys((one["method"], one["trust"]) for one in records):
        mine = [one for one in records if (one["method"], one["trust"]) == (method, trust)]
        plain = {one["seed"]: one for one in mine if one["bits"] == 32}
        for bits in sorted({one["bits"] for one in mine}, reverse=True):
            pairs = [(one, plain[one["seed"]]) for one in mine if one["bits"] == bits and one["seed"] in plain]
            if not pairs:
                continue
            first, float32 = pairs[0]
            decoder = 4 * PAPER_DECODER * first["rounds"]
            row: dict[str, Any] = {"method": method, "trust": trust, "bits": bits, "seeds": len(pairs)}
            for way in ("bytes_up", "bytes_down"):
                row[way] = first[way]
                row[f"{way}_below_float32"] = round(float32[way] / first[way], 3)
                row[f"{way}_of_paper_decoder"] = round(first[way] / decoder, 5)
            for name in ("synthetic_only", "mixed"):
                for at, measure in enumerate(("accuracy", "balanced")):
                    lost = [float(other[name][at] - one[name][at]) for one, other in pairs]
                    values = [other[name][at] for _, other in pairs]
                    row[f"{name}_{measure}_lost"] = round(sum(lost) / len(lost), 3)
                    row[f"{name}_{measure}_lost_most"] = round(max((abs(value), value) for value in lost)[1], 3)
                    row[f"{name}_{measure}_float32_range"] = round(max(values) - min(values), 3)
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=sorted({name for name, _ in METHODS}))
    parser.add_argument("--trust", nargs="+", default=["local", "secagg"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--out", type=Path, default=RESULTS / "compression.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.out.is_file() else []
    wanted = [
        row
        for row in ROWS
        if (row.method, row.trust) in METHODS and row.method in options.methods and row.trust in options.trust
    ]
    for seed in options.seeds:
        (federation,) = load_federations("organ-iid", seed)
        own = local_heads(federation)
        for row in wanted:
            for bits in options.bits:
                key = (row.method, row.trust, bits, seed)
                if key in {(one["method"], one["trust"], one["bits"], one["seed"]) for one in records}:
                    continue
                records.append(run_once(federation, own, row, bits))
                print(json.dumps(records[-1]), flush=True)
                content: dict[str, Any] = {"dataset": "organ-iid", "goals": GOALS}
                content |= {"paper_decoder_parameters": PAPER_DECODER}
                write_text(
                    options.out,
                    json.dumps({**content, "compared": compared(records), "runs": records}, indent=1) + "\n",
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
