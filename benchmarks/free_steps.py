"""What steps that cost no privacy do to any generator's set: rows filled to unit length, and rows without noise.

    python -m benchmarks.free_steps

The table's `fedhypevae` row has both and its rivals are drawn from as published. Here the rivals get them too:
`dp_cvae`, whose rows are its decoder's means, noise that fills each row to unit length, all but 2 % of them; `dp_gauss`
2 % of rows at its class means; and `fedhypevae` is shown without its prototypes. OrganAMNIST over ten even sites, trust
local, at three ε. Results are kept in `benchmarks/results/free_steps.json`, and rendered to `free_steps.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import judge, train
from benchmarks.markdown import as_line, head_of
from benchmarks.pool import run_all
from benchmarks.protocol import SEEDS, Federation, load_federations
from benchmarks.rows import ROWS, Row
from benchmarks.sources import data_folder
from benchmarks.table import RESULTS, load_records, write_text
from common.errors import ConfigError, FedHypeVAEError
from common.evaluation.heads import LinearHead
from common.evaluation.scores import Split
from common.generator.prototypes import PROTOTYPES
from common.loop import LoopResult
from common.methods.base import seeded
from common.methods.published import published_set

BUDGETS = (1.0, 4.0, 8.0)
METHODS = ("fedhypevae", "dp_gauss", "dp_cvae")
SHARE = 0.02
_COLUMNS = ("mmd2", "precision", "recall", "coverage")


def measure(method: str, epsilon: float, seed: int) -> dict[str, Any]:
    """One record: a method's set as the table draws it, and with or without the free steps."""
    torch.set_num_threads(1)
    (federation,) = load_federations("organ-iid", seed, data_folder())
    row = next(row for row in ROWS if (row.method, row.trust) == (method, "local"))
    trained = train(federation, row, {"epsilon": epsilon})
    if trained.synthetic is None:
        raise ConfigError(f"{method} draws no samples: expected a generator")
    variants = {"as in the table": trained.synthetic, **_variants(federation, row, trained.synthetic, trained.result)}
    record: dict[str, Any] = {"method": method, "epsilon": epsilon, "seed": seed, "variants": {}}
    for name, synthetic in variants.items():
        found = judge(federation, synthetic, None)
        record["variants"][name] = {"knn": found["heads"]["knn"]["balanced_accuracy"], **found["fidelity"]}
    return record


def filled(rows: torch.Tensor, generator: torch.Generator, bare: float = SHARE) -> torch.Tensor:
    """Rows (n, d) with noise that brings each to unit length in expectation; a share `bare` of them as they are."""
    left = (1.0 - rows.square().sum(1, keepdim=True)).clamp(min=0.0) / rows.shape[1]
    noisy = rows + left.sqrt() * torch.randn(rows.shape, generator=generator)
    return torch.where(torch.rand(len(rows), 1, generator=generator) < bare, rows, noisy)


def _variants(federation: Federation, row: Row, synthetic: Split, result: LoopResult) -> dict[str, Split]:
    (rows, labels), artifact = synthetic, result.artifact
    generator = seeded("free steps", federation.seed)
    if row.method == "dp_cvae":
        return {"filled to unit length": (filled(rows, generator), labels)}
    if row.method == "dp_gauss":
        due = published_set(result.context, artifact)
        wanted = labels if due is None else due.labels_of(torch.arange(len(labels)))
        at_means = torch.rand(len(labels), 1, generator=generator) < SHARE
        moved = torch.where(at_means, artifact.tensors["class_means"][wanted], rows)
        head = LinearHead(artifact.tensors["head.weight"], artifact.tensors["head.bias"])
        return {"2 % at class means": (moved, head.logits(moved).argmax(1))}
    without = {name: value for name, value in artifact.tensors.items() if name != PROTOTYPES}
    due = published_set(result.context, replace(artifact, tensors=without))
    return {} if due is None else {"without prototypes": due.all(threads=1)}


def render(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds, with the standard deviation of coverage and of the kNN head's score."""
    titles = ["ε", "method", "set", "kNN head BACC, %", "MMD²", "precision", "recall", "coverage", "seeds"]
    lines = [
        "OrganAMNIST over ten even sites, trust local: sets as the table draws them, and with or without the steps",
        "that cost no privacy. Means over seeds; in brackets the standard deviation.",
        "",
        *head_of(titles),
    ]
    for epsilon in sorted({one["epsilon"] for one in records}):
        for method in METHODS:
            mine = [one for one in records if (one["epsilon"], one["method"]) == (epsilon, method)]
            for name in mine[0]["variants"] if mine else ():
                found = [one["variants"][name] for one in mine]
                cells = [f"{epsilon:g}", method, name, _mean([100 * one["knn"] for one in found], 1)]
                cells += [f"{statistics.mean(one[column] for one in found):.4f}" for column in _COLUMNS[:-1]]
                cells += [_mean([one["coverage"] for one in found], 3), str(len(found))]
                lines.append(as_line(cells))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.free_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS / "free_steps.json")
    parser.add_argument("--fresh", action="store_true", help="forget the records that are there")
    options = parser.parse_args(arguments)
    try:
        records = [] if options.fresh else load_records(options.out)
        done = {(one["method"], one["epsilon"], one["seed"]) for one in records}
        tasks = [(name, epsilon, seed) for seed in options.seeds for epsilon in BUDGETS for name in METHODS]

        def keep(record: dict[str, Any]) -> str:
            records.append(record)
            records.sort(key=lambda one: (one["epsilon"], METHODS.index(one["method"]), one["seed"]))
            write_text(options.out, json.dumps(records, indent=1) + "\n")
            return f"{record['method']} {record['epsilon']:g} {record['seed']}"

        run_all(measure, [task for task in tasks if task not in done], options.workers, keep)
        write_text(options.out.with_suffix(".md"), render(records))
    except FedHypeVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _mean(values: Sequence[float], digits: int) -> str:
    """The mean, and in brackets the standard deviation where there are several."""
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    # one thread a worker: the products are small, and the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
