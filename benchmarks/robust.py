"""What one lying site can do to the set within the bounds of its statistics, and what trimmed statistics cost.

OrganAMNIST, DP-Gauss (its set comes from the statistics alone), ε of the table. One site of 3, 5 or 10 takes the mean
of each class for that of the next one, with as many records as it has, or with as many as the run's public number lets
it claim: within the bounds, so nobody can tell. The score is that of the head that anybody fits on the set, at the
honest sites.

    python -m benchmarks.robust
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.protocol import SEEDS, Federation, organ_federation
from benchmarks.records import conditions, write_result
from benchmarks.rows import ROWS
from benchmarks.sources import data_folder, load_organ
from common.config.federation import LEAST_SITES
from common.config.run import Scalar
from common.evaluation.heads import fit_linear_head
from common.evaluation.scores import mean_scores, score
from common.loop import problem_of
from common.methods import get_method
from common.methods.base import RunContext
from common.methods.published import published_set
from common.methods.site_release import noise_source, site_statistics
from common.privacy.combined import combine_statistics
from common.privacy.robust import settled
from common.records import SiteData
from server_app.statistics_bounds import StatisticsBounds

SITES = (3, 5, 10)
LIES = ("none", "own size", "largest size")
METHOD = "dp_gauss"
_ROWS = 5_000


def main() -> None:
    """Run every point and write `results/robust.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pool = load_organ(data_folder())
    records = []
    for alpha in (None, 0.3):
        for sites in SITES:
            for seed in SEEDS:
                federation = organ_federation(pool, seed, sites, alpha)
                records += points(federation, seed)
    summary = summarise(records)
    write_result("robust", {"conditions": conditions(), "points": summary, "records": records}, chosen.out)
    for point in summary:
        print(json.dumps(point))


def points(federation: Federation, seed: int) -> list[dict[str, Any]]:
    """Balanced accuracy of every lie, with and without trimmed statistics."""
    found = []
    for lie in LIES:
        for robust in ("off", "trimmed"):
            if robust == "trimmed" and len(federation.sites) < LEAST_SITES:
                continue
            value = _score(federation, lie, robust, seed)
            found.append(
                {"dataset": federation.dataset, "sites": len(federation.sites), "lie": lie, "statistics": robust}
                | {"seed": seed, "balanced_accuracy": value}
            )
    return found


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds."""
    keys = ("dataset", "sites", "lie", "statistics")
    points: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        points.setdefault(tuple(record[key] for key in keys), []).append(record["balanced_accuracy"])
    return [
        {**dict(zip(keys, point, strict=True)), "mean": round(statistics.mean(values), 4)}
        | {"spread": round(max(values) - min(values), 4)}
        for point, values in points.items()
    ]


def _score(federation: Federation, lie: str, robust: str, seed: int) -> float:
    row = next(row for row in ROWS if row.method == METHOD)
    total = sum(len(site.train.labels) for site in federation.sites)
    changes: dict[str, Scalar] = {
        "synthetic-rows": _ROWS,
        "robust-statistics": robust,
        "public-total": total,
        "seed": seed,
    }
    config = row.config(federation, changes)
    method = get_method(config.method)
    data = [site.train for site in federation.sites]
    context = RunContext(config, problem_of(data, federation.class_names), method.plan(config))
    spec, noise = method.statistics(context), context.plan.statistics_noise
    if spec is None or noise is None:
        raise ValueError(f"expected {METHOD} to release statistics")
    releases = []
    bounds = StatisticsBounds.of(config, spec, noise)
    for index, site in enumerate(data):
        last = lie != "none" and index == len(data) - 1
        told = _lied(site, federation.num_classes) if last else site
        release = site_statistics(context, spec, 0.0 if last else noise, told, noise_source(config, index, -1))
        if last and lie == "largest size":
            release = _largest(release, bounds)
        bounds.check(release)
        releases.append(release)
    combined = combine_statistics(spec, settled(config.federation.robust_statistics, releases), noise, range(len(data)))
    state = method.prepare(context, method.init(context), combined)
    due = published_set(context, method.finish(context, state))
    if due is None:
        raise ValueError(f"expected {METHOD} to publish a set")
    head = fit_linear_head(*due.all(threads=1), federation.num_classes)
    honest = federation.sites[:-1]
    scores = mean_scores([score(head, site.test.embeddings, site.test.labels) for site in honest])
    return float(scores.balanced_accuracy)


def _lied(site: SiteData, classes: int) -> SiteData:
    """The site's records, each with the label of the next class."""
    return SiteData(site.embeddings, (site.labels + 1) % classes, site.groups)


def _largest(release: Mapping[str, Tensor], bounds: StatisticsBounds) -> dict[str, Tensor]:
    """The release as of as many records as one site can claim."""
    factor = 0.98 * bounds.most_records / float(release["class_counts"].sum())
    return {name: value * factor for name, value in release.items()}


if __name__ == "__main__":
    main()
