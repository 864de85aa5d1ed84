"""Each part of FedHypeVAE on and off: what the paper's parts and ours are worth, with spreads over seeds.

    python -m benchmarks.ablations
    python -m benchmarks.ablations --only no-averaging plain-rows --seeds 3407

A third of the table's rows of OrganAMNIST at three times the table's ε, which is about the table's ratio of signal to
noise, so that all of it takes minutes. The base is the table's `fedhypevae` row under trust `local`; each variant
changes one part of it. Results are kept in `benchmarks/results/ablations.json`, and rendered to `ablations.md`; a
record made with other settings than today's is made again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.cells import score_trained, train
from benchmarks.markdown import as_line, head_of
from benchmarks.pool import run_all
from benchmarks.protocol import ORGAN_SITES, SEEDS, BenchmarkSite, Federation, organ_federation
from benchmarks.reference import local_heads, split_of
from benchmarks.rows import EPSILON, ROWS, Row
from benchmarks.sources import data_folder, load_organ
from benchmarks.table import RESULTS, load_records, write_text
from common.config.run import Scalar
from common.errors import ConfigError, FedHypeVAEError
from common.evaluation.fidelity import FidelityConfig, fidelity
from common.evaluation.heads import LinearHead
from common.evaluation.nonlinear_heads import fit_neighbour_head
from common.evaluation.scores import mean_scores, score
from common.methods.base import seeded
from common.records import SiteData

ROWS_OF_ORGAN = 8_400
_COMMON: dict[str, Scalar] = {"epsilon": 3 * EPSILON, "num-rounds": 60, "synthetic-rows": 5_000}
_JUDGED = FidelityConfig(max_rows=1000)
BASE = "base"


@dataclass(frozen=True)
class Variant:
    """One part changed.

    Attributes:
        name: in the results.
        whose: the paper's part, or ours.
        what: in words.
        changes: flat settings beside the base's.
    """

    name: str
    whose: Literal["paper", "ours"]
    what: str
    changes: dict[str, Scalar]


VARIANTS = (
    Variant("no-code", "paper", "no hypernetwork: one decoder for all sites", {"code-dim": 0}),
    Variant("code-2", "paper", "hypernetwork with a code of 2", {"code-dim": 2}),
    Variant("no-latent", "paper", "no latent", {"latent-dim": 0, "elbo-weight": 0.0}),
    Variant("latent-4", "paper", "latent of 4, trained by the ELBO", {"latent-dim": 4, "elbo-weight": 0.05}),
    Variant("standard-prior", "paper", "sampled from N(0, I), not the generated priors", {"printed-rows": True}),
    # records' gradients are clipped to 0.03, terms without records are not: the lower weight is that of a clipped one
    Variant("mmd-released", "paper", "MMD to the released features", {"mmd": "released", "mmd-weight": 1.0}),
    Variant("mmd-released-0.03", "paper", "the same, weight 0.03", {"mmd": "released"}),
    Variant("mmd-per-example", "paper", "MMD inside the clipped gradient", {"mmd": "per-example", "mmd-weight": 1.0}),
    Variant("mmd-per-example-0.03", "paper", "the same, weight 0.03", {"mmd": "per-example"}),
    Variant("no-lipschitz", "paper", "no bound on spectral norms", {"lipschitz-bound": 1e6}),
    Variant("lipschitz-penalty", "paper", "Lipschitz penalty too", {"lipschitz-penalty": 0.1}),
    Variant("no-meta-code", "paper", "meta-code not fitted", {"meta-steps": 0}),
    Variant("four-codes", "paper", "four meta-codes", {"num-codes": 4}),
    Variant("joint-encoder", "paper", "encoder trained on records, certified", {"encoder-training": "joint"}),
    Variant(
        "no-discriminative", "ours", "no discriminative term: the ELBO alone",
        {"discriminative-weight": 0.0, "elbo-weight": 1.0},
    ),
    Variant("no-averaging", "ours", "last iterate, no average", {"averaging-fraction": 0.0}),
    Variant("no-momentum", "ours", "no momentum", {"momentum": 0.0}),
    Variant("no-logit-adjustment", "ours", "scores for the classes as frequent as they are", {"logit-adjustment": 0.0}),
    Variant("no-score-noise", "ours", "rates not bounded by the noise of a score", {"score-noise": 0.0}),
    Variant("plain-rows", "ours", "the decoder's own variance, no prototypes", {"prototypes": False}),
    Variant("statistics-10", "ours", "a tenth of the budget for the statistics", {"statistics-share": 0.1}),
)  # fmt: skip


def base_row() -> Row:
    """The table's `fedhypevae` row under trust `local`, with the settings that every run here has."""
    row = next(row for row in ROWS if (row.method, row.trust) == ("fedhypevae", "local"))
    return replace(row, settings={**row.settings, **_COMMON})


@lru_cache(maxsize=1)
def federation_of(seed: int) -> tuple[Federation, tuple[LinearHead, ...]]:
    """Ten IID sites of a third of the table's rows of OrganAMNIST, and their own heads."""
    pool = load_organ(data_folder())
    few = replace(pool, embeddings=pool.embeddings[:ROWS_OF_ORGAN], labels=pool.labels[:ROWS_OF_ORGAN])
    federation = organ_federation(few, seed)
    return federation, local_heads(federation)


@lru_cache(maxsize=64)
def _flat(name: str) -> dict[str, Scalar]:
    known = {variant.name: variant.changes for variant in VARIANTS} | {BASE: {}}
    if name not in known:
        raise ConfigError(f"unknown variant {name!r}, expected one of {', '.join(known)}")
    nobody = SiteData(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    sites = (BenchmarkSite("site", nobody, nobody, nobody),) * ORGAN_SITES
    return base_row().config(Federation("organ-iid", SEEDS[0], (), sites), known[name]).to_flat()


def changed(name: str) -> dict[str, Scalar]:
    """The settings in which a variant's configuration differs from the base's; empty where the base has them.

    Raises:
        ConfigError: there is no such variant.
    """
    return {key: value for key, value in _flat(name).items() if _flat(BASE)[key] != value}


def measure(name: str, seed: int) -> dict[str, Any]:
    """One record: scores, the kNN head and fidelity of one variant with one seed."""
    torch.set_num_threads(1)
    federation, own = federation_of(seed)
    row, started = base_row(), time.perf_counter()
    trained = train(federation, row, changed(name))
    record: dict[str, Any] = {"variant": name, "seed": seed, "settings": settings_of(name)}
    for column, scores in score_trained(federation, own, row, trained).items():
        mean = None if scores is None else mean_scores(list(scores))
        record[column] = None if mean is None else [mean.accuracy, mean.balanced_accuracy]
    if trained.synthetic is None:
        raise ConfigError("the base draws no samples: expected a generator")
    tests = [split_of(site.test) for site in federation.sites]
    rows, labels = torch.cat([one for one, _ in tests]), torch.cat([one for _, one in tests])
    knn = score(fit_neighbour_head(*trained.synthetic, federation.num_classes).probabilities(rows), rows, labels)
    near = fidelity(rows, trained.synthetic[0], seeded("ablations", seed), _JUDGED)
    recall, coverage = (None, None) if near.manifold is None else (near.manifold.recall, near.manifold.coverage)
    record |= {"knn": knn.balanced_accuracy, "mmd2": near.mmd2, "recall": recall, "coverage": coverage}
    return {**record, "two_sample": near.two_sample, "seconds": round(time.perf_counter() - started, 2)}


def settings_of(name: str) -> dict[str, Scalar]:
    """What a record is made with, to tell one of earlier settings from today's; the seed is told apart."""
    return {key: value for key, value in _flat(name).items() if key != "seed"}


def render(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: the base, then each variant and its difference from the base over the same seeds."""
    lines = [
        f"{ROWS_OF_ORGAN:,} rows of OrganAMNIST at ten IID sites, (ε, δ) = ({3 * EPSILON:g}, 1e-4), trust local, 60",
        "rounds. ACC/BACC in %, means over seeds; in brackets the standard deviation of BACC over seeds. The",
        "difference is that of the synthetic-only BACC from the base with the same seed, and its standard deviation.",
        "",
    ]
    head = ["variant", "of", "synthetic-only", "difference", "mixed", "personalised", "kNN head BACC", "MMD²",
            "recall", "coverage", "two-sample", "seeds"]  # fmt: skip
    lines += head_of(head)
    base = {one["seed"]: one for one in records if one["variant"] == BASE}
    for variant in (Variant(BASE, "ours", "the table's settings", {}), *VARIANTS):
        label = f"{variant.name}: {variant.what}"
        if variant.name != BASE and not changed(variant.name):
            lines.append(as_line([label, variant.whose, "as the base", *["-"] * (len(head) - 3)]))
            continue
        mine = [one for one in records if one["variant"] == variant.name]
        if not mine:
            continue
        gaps = [
            100 * (one["synthetic_only"][1] - base[one["seed"]]["synthetic_only"][1])
            for one in mine
            if one["seed"] in base and variant.name != BASE
        ]
        cells = [label, variant.whose, _pair(mine, "synthetic_only")]
        cells += [f"{statistics.mean(gaps):+.1f} ({_spread(gaps):.1f})" if gaps else "-"]
        cells += [_pair(mine, "mixed"), _pair(mine, "personalised"), _mean(mine, "knn", 100, 1), _mean(mine, "mmd2")]
        cells += [_mean(mine, name, 1, 3) for name in ("recall", "coverage", "two_sample")]
        lines.append(as_line([*cells, str(len(mine))]))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[one.name for one in VARIANTS], help="the base is always run")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.json")
    options = parser.parse_args(arguments)
    try:
        names = [BASE, *(name for name in options.only if changed(name))]
        known = {variant.name for variant in VARIANTS} | {BASE}
        records = [
            one
            for one in load_records(options.out)
            if one["variant"] in known and one["settings"] == settings_of(one["variant"])
        ]
        done = {(one["variant"], one["seed"]) for one in records}
        tasks = [(name, seed) for seed in options.seeds for name in names if (name, seed) not in done]
        order = [BASE, *(variant.name for variant in VARIANTS)]

        def keep(record: dict[str, Any]) -> str:
            records.append(record)
            records.sort(key=lambda one: (order.index(one["variant"]), one["seed"]))
            write_text(options.out, json.dumps(records, indent=1) + "\n")
            return f"{record['variant']} {record['seed']}"

        run_all(measure, tasks, options.workers, keep)
        write_text(options.out.with_suffix(".md"), render(records))
    except FedHypeVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _pair(records: Sequence[dict[str, Any]], name: str) -> str:
    found = [one[name] for one in records if one[name] is not None]
    if not found:
        return "-"
    accuracy, balanced = ([100 * one[at] for one in found] for at in (0, 1))
    return f"{statistics.mean(accuracy):.1f}/{statistics.mean(balanced):.1f} ({_spread(balanced):.1f})"


def _mean(records: Sequence[dict[str, Any]], name: str, factor: float = 1.0, places: int = 4) -> str:
    found = [factor * one[name] for one in records if one[name] is not None]
    return f"{statistics.mean(found):.{places}f}" if found else "-"


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    # one thread a worker: the products are small, and the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
