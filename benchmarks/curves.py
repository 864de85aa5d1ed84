"""Scores against ε, against the number of sites at a fixed total, and against the skew of the classes.

    python -m benchmarks.curves
    python -m benchmarks.curves --only epsilon --methods dp_fedsgd

Each curve is a picture and its data as JSON in `benchmarks/results/curves/`; points that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.cells import score_trained, train
from benchmarks.protocol import SEEDS, Federation, organ_federation
from benchmarks.reference import local_heads
from benchmarks.rows import ROWS, Row
from benchmarks.sources import data_folder, load_organ
from benchmarks.table import RESULTS, load_records, write_text
from common.classifier import mean_scores
from common.config import Scalar
from common.errors import ConfigError, FedHypeVAEError

# 0 stands for IID sites, as in the configuration.
CURVES: dict[str, tuple[float, ...]] = {
    "epsilon": (0.5, 1.0, 2.0, 4.0, 8.0, math.inf),
    "sites": (5, 10, 20, 50, 100),
    "alpha": (0.05, 0.1, 0.3, 1.0, 10.0, 0.0),
}
_METHODS = ("dp_gauss", "dp_fedsgd", "fedhypevae_tied")
_LABELS = {"epsilon": "ε (δ = 1e-4)", "sites": "sites, 25,211 records in all", "alpha": "Dirichlet α (last: IID)"}


def point(curve: str, value: float, row: Row, seed: int) -> dict[str, Any]:
    """Scores of one method at one point of a curve, on OrganAMNIST.

    Raises:
        ConfigError: there is no such curve.
    """
    if curve not in CURVES:
        raise ConfigError(f"unknown curve {curve!r}, expected one of {', '.join(CURVES)}")
    torch.set_num_threads(1)
    pool, changes = load_organ(data_folder()), dict[str, Scalar]()
    federation = organ_federation(pool, seed)
    if curve == "epsilon":
        changes["epsilon"] = value
    elif curve == "sites":
        federation = organ_federation(pool, seed, num_sites=int(value))
    elif value > 0:
        federation = organ_federation(pool, seed, alpha=value)
    return {"curve": curve, "value": _word(value), "method": row.method, "trust": row.trust, "seed": seed} | _scores(
        federation, row, changes
    )


def draw(curve: str, records: Sequence[dict[str, Any]], path: Path) -> None:
    """One picture: balanced accuracy of the synthetic-only and the mixed score, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    values = [_word(value) for value in CURVES[curve]]
    for axis, score in zip(axes, ("synthetic_only", "mixed"), strict=True):
        for name in dict.fromkeys((record["method"], record["trust"]) for record in records):
            mine = [record for record in records if (record["method"], record["trust"]) == name]
            points = [
                [one[score] for one in mine if one["value"] == value and one[score] is not None] for value in values
            ]
            known = [at for at, found in enumerate(points) if found]
            means = [100 * sum(points[at]) / len(points[at]) for at in known]
            axis.plot(known, means, marker="o", label=f"{name[0]} ({name[1]})")
        axis.set(title=score.replace("_", "-"), xlabel=_LABELS[curve], xticks=range(len(values)), xticklabels=values)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("balanced accuracy, %")
    axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--methods", nargs="+", default=list(_METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS[:1]))
    parser.add_argument("--out", type=Path, default=RESULTS / "curves")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if row.method in options.methods and row.registered is not None]
    try:
        if not rows:
            raise ConfigError(f"no row of the table is called {' or '.join(options.methods)}")
        for curve in options.only:
            path = options.out / f"{curve}.json"
            records = load_records(path)
            done = {(one["value"], one["method"], one["trust"], one["seed"]) for one in records}
            wanted = [
                (value, row, seed)
                for value in CURVES[curve]
                for row in rows
                for seed in options.seeds
                if (_word(value), row.method, row.trust, seed) not in done
            ]
            for value, row, seed in track(wanted, description=curve):
                records.append(point(curve, value, row, seed))
                write_text(path, json.dumps(records, indent=1) + "\n")
            draw(curve, records, options.out / f"{curve}.png")
    except FedHypeVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _scores(federation: Federation, row: Row, changes: dict[str, Scalar]) -> dict[str, float | None]:
    table = score_trained(federation, local_heads(federation), row, train(federation, row, changes))
    return {
        name: None if scores is None else mean_scores(list(scores)).balanced_accuracy for name, scores in table.items()
    }


def _word(value: float) -> str:
    """A value as it stands in the data file and under the picture; JSON has no infinity."""
    return "∞" if math.isinf(value) else f"{value:g}"


if __name__ == "__main__":
    sys.exit(main())
