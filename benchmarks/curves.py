"""Scores against ε, against the number of sites at a fixed total, and against the skew of the classes.

    python -m benchmarks.curves
    python -m benchmarks.curves --only epsilon --methods dp_fedsgd

Each curve is a picture and its data as JSON in `benchmarks/results/curves/`. Against ε there is a second picture: what
other heads make of the synthetic set, and how near it is to real rows; its sets are as large as the table's. Points
that are there are not run again: after a change of settings start with `--fresh`. One seed, and 5,000 synthetic rows
against sites and skew, so that all of it takes minutes: the table has the spreads over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import judge, train
from benchmarks.pool import run_all
from benchmarks.protocol import ORGAN_SITES, SEEDS, Federation, organ_federation
from benchmarks.reference import local_heads, split_of
from benchmarks.rows import ROWS, Row
from benchmarks.sources import data_folder, load_organ
from benchmarks.table import RESULTS, load_records, write_text
from common.config.run import Scalar
from common.errors import ConfigError, FedHypeVAEError
from common.evaluation.heads import LinearHead
from common.evaluation.scores import MIXING, mean_scores, score_site

# 0 stands for IID sites, as in the configuration.
CURVES: dict[str, tuple[float, ...]] = {
    "epsilon": (0.5, 1.0, 2.0, 4.0, 8.0, math.inf),
    "sites": (5, 10, 20, 50, 100),
    "alpha": (0.05, 0.1, 0.3, 1.0, 10.0, 0.0),
}
# method and trust; generators that cost many times the others stand in the first curve and in the table alone
_LINES = ("dp_gauss/local", "dp_fedsgd/local", "fedhypevae_tied/local", "fedhypevae_tied/secagg")
_MORE_LINES = {"epsilon": ("dp_cgan/local", "dp_cvae/local", "fedhypevae/local")}
_FEW_ROWS = 5_000  # for curves that no other head is judged by
# without noise nothing need be clipped, and steps cost no privacy: as many as the scores gain from
_WITHOUT_NOISE: dict[str, Scalar] = {"clip-norm": math.inf, "num-rounds": 300, "learning-rate": 64.0}
_SCORES = ("synthetic_only", "mixed", "own_lambda", "local_only")
_JUDGED = {"mmd2": "MMD² to real rows", "coverage": "coverage", "knn": "balanced accuracy of a kNN head, %"}
_LABELS = {"epsilon": "ε (δ = 1e-4)", "sites": "sites, 25,211 records in all", "alpha": "Dirichlet α (last: IID)"}


def point(curve: str, value: float, row: Row, seed: int) -> dict[str, Any]:
    """Scores of one method at one point of a curve, on OrganAMNIST.

    Raises:
        ConfigError: there is no such curve.
    """
    if curve not in CURVES:
        raise ConfigError(f"unknown curve {curve!r}, expected one of {', '.join(CURVES)}")
    torch.set_num_threads(1)
    changes: dict[str, Scalar] = {"epsilon": value} if curve == "epsilon" else {"synthetic-rows": _FEW_ROWS}
    num_sites, alpha = ORGAN_SITES, 0.0
    if curve == "sites":
        num_sites = int(value)
    elif curve == "alpha":
        alpha = value
    elif math.isinf(value):
        changes |= _WITHOUT_NOISE
    federation, own = federation_of(seed, num_sites, alpha)
    trained = train(federation, row, changes)
    record = {"curve": curve, "value": _word(value), "method": row.method, "trust": row.trust, "seed": seed}
    record |= _scores(federation, own, row, trained.head)
    if curve == "epsilon" and trained.synthetic is not None:
        found = judge(federation, trained.synthetic, trained.fitted)
        heads = {name: 100 * one["balanced_accuracy"] for name, one in found["heads"].items()}
        record["judged"] = {**found["fidelity"], **heads}
    return record


@lru_cache(maxsize=2)
def federation_of(seed: int, num_sites: int, alpha: float) -> tuple[Federation, tuple[LinearHead, ...]]:
    """OrganAMNIST over simulated sites, IID for α = 0, and the sites' own heads; kept for the next method."""
    federation = organ_federation(load_organ(data_folder()), seed, num_sites, alpha or None)
    return federation, local_heads(federation)


def has_point(value: float, row: Row) -> bool:
    """Whether a row can be run there: without a guarantee there is no noise for sites to share."""
    return not (math.isinf(value) and row.trust == "secagg")


def draw(curve: str, records: Sequence[dict[str, Any]], path: Path) -> None:
    """One picture: balanced accuracy of the synthetic-only and the mixed score, one line a method."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    values = [_word(value) for value in CURVES[curve]]
    alone = {one["value"]: 100 * one["local_only"] for one in records if one.get("local_only") is not None}
    for axis, score in zip(axes, ("synthetic_only", "mixed"), strict=True):
        _plot(axis, curve, records, partial(_percent, score))
        known = [at for at, value in enumerate(values) if value in alone]
        axis.plot(known, [alone[values[at]] for at in known], "k--", label="a site's own head")
        axis.set(title=score.replace("_", "-"))
    axes[0].set_ylabel("balanced accuracy, %")
    _save(figure, axes[0], path)


def draw_judged(curve: str, records: Sequence[dict[str, Any]], path: Path) -> None:
    """One picture of what generators are judged by beside scores; nothing where no record has it."""
    from matplotlib import pyplot

    judged = [one for one in records if one.get("judged")]
    if not judged:
        return
    figure, axes = pyplot.subplots(1, len(_JUDGED), figsize=(14, 4), layout="constrained")
    for axis, (name, title) in zip(axes, _JUDGED.items(), strict=True):
        _plot(axis, curve, judged, partial(_judged, name))
        axis.set(title=title, yscale="log" if name == "mmd2" else "linear")
    _save(figure, axes[0], path)


def _plot(
    axis: Any, curve: str, records: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], float | None]
) -> None:
    """One line a method: means over the seeds of what `read` finds in the records."""
    values = [_word(value) for value in CURVES[curve]]
    for name in dict.fromkeys((record["method"], record["trust"]) for record in records):
        mine = [record for record in records if (record["method"], record["trust"]) == name]
        points = [[read(one) for one in mine if one["value"] == value] for value in values]
        found = {at: [one for one in point if one is not None] for at, point in enumerate(points)}
        means = {at: sum(point) / len(point) for at, point in found.items() if point}
        axis.plot(list(means), list(means.values()), marker="o", label=f"{name[0]} ({name[1]})")
    axis.set(xlabel=_LABELS[curve], xticks=range(len(values)), xticklabels=values)
    axis.grid(alpha=0.3)


def _save(figure: Any, axis: Any, path: Path) -> None:
    from matplotlib import pyplot

    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _percent(score: str, record: dict[str, Any]) -> float | None:
    return None if record[score] is None else 100 * record[score]


def _judged(name: str, record: dict[str, Any]) -> float | None:
    found: float | None = record["judged"][name]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CURVES), default=list(CURVES))
    more = "METHOD, or METHOD/TRUST; a curve's own where none is named"
    parser.add_argument("--methods", nargs="+", default=[], help=more)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS[:1]))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS / "curves")
    parser.add_argument("--fresh", action="store_true", help="forget the points that are there")
    options = parser.parse_args(arguments)
    try:
        for curve in options.only:
            rows = _rows(options.methods or [*_LINES, *_MORE_LINES.get(curve, ())])
            path = options.out / f"{curve}.json"
            records = [] if options.fresh else load_records(path)
            known = {(row.method, row.trust) for row in ROWS}
            records = [one for one in records if (one["method"], one["trust"]) in known]
            done = {(one["value"], one["method"], one["trust"], one["seed"]) for one in records}
            wanted = [
                (curve, value, row, seed)
                for seed in options.seeds
                for value in CURVES[curve]
                for row in rows
                if has_point(value, row) and (_word(value), row.method, row.trust, seed) not in done
            ]
            run_all(point, wanted, options.workers, partial(_keep, records, path))
            draw(curve, records, options.out / f"{curve}.png")
            draw_judged(curve, records, options.out / f"{curve}-judged.png")
    except FedHypeVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _rows(names: Sequence[str]) -> list[Row]:
    rows = [row for row in ROWS if {row.method, f"{row.method}/{row.trust}"} & set(names) and row.registered]
    if not rows:
        raise ConfigError(f"no row of the table is called {' or '.join(names)}")
    return rows


def _keep(records: list[dict[str, Any]], path: Path, record: dict[str, Any]) -> str:
    records.append(record)
    values = [_word(value) for value in CURVES[record["curve"]]]
    names = [(row.method, row.trust) for row in ROWS]
    records.sort(key=lambda one: (names.index((one["method"], one["trust"])), values.index(one["value"]), one["seed"]))
    write_text(path, json.dumps(records, indent=1) + "\n")
    return f"{record['curve']} {record['value']} {record['method']} {record['trust']}"


def _scores(
    federation: Federation, own: Sequence[LinearHead], row: Row, head: LinearHead | None
) -> dict[str, float | None]:
    """Balanced accuracies of a head, means over sites; those that take no further fit at the site."""
    if head is None:
        return dict.fromkeys(_SCORES)
    scaled = head.scaled(row.head_scale)
    tables = [
        score_site(split_of(site.train), split_of(site.validation), split_of(site.test), scaled, MIXING, None, local)
        for site, local in zip(federation.sites, own, strict=True)
    ]
    return {name: mean_scores([table[name] for table in tables]).balanced_accuracy for name in _SCORES}


def _word(value: float) -> str:
    """A value as it stands in the data file and under the picture; JSON has no infinity."""
    return "∞" if math.isinf(value) else f"{value:g}"


if __name__ == "__main__":
    # one thread a worker: the products are small, and the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
