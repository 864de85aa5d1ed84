"""`fedhypevae plan`: what a run would cost and be worth, before anything is spent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.console import console, said, say

if TYPE_CHECKING:
    from common.assurance.plan import Cohort, RunPlan
    from common.config.run import RunConfig
    from common.records import SiteData

# Seconds a round takes beside the sites' computing, over TLS: polling, starting processes (three and ten sites).
_FEW_SITES, _FEW_S, _MANY_SITES, _MANY_S = 3, 6.3, 10, 13.5
_HELD_OUT = 0.25


def plan(
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of each site for this run.")] = None,
    delta: Annotated[float | None, typer.Option(help="Its delta.")] = None,
    sites: Annotated[int | None, typer.Option(help="How many sites take part.")] = None,
    records: Annotated[int, typer.Option(help="Training records (or patients) of each site.")] = 1000,
    dim: Annotated[int, typer.Option(help="Width of the embeddings.")] = 1280,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 11,
    rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, KEY=VALUE; may be repeated.")
    ] = None,
    simulation: Annotated[bool, typer.Option(help="Expect a score from a simulation on public images.")] = True,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Repetitions of the simulation.")] = 2,
    public_rows: Annotated[int, typer.Option(min=50, help="Public records to simulate with, at most.")] = 1000,
    worth: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the noiseless score that makes a run worth it.")
    ] = 0.8,
    cache: Annotated[
        Path, typer.Option(envvar="FEDHYPEVAE_CACHE", help="Cache of the demonstration's embeddings.")
    ] = Path("outputs/cache"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Noise, epsilon by step and accountant, signal, bytes, time, and the score to expect. Spends nothing.

    Example: fedhypevae plan --epsilon 1 --sites 10 --records 1600 --dim 768 --classes 8
    """
    from common.assurance.plan import Cohort, plan_run
    from deploy.settings import run_config

    least = None if sites is None else min(sites, 2)
    config = run_config(setting, epsilon=epsilon, delta=delta, num_rounds=rounds, num_sites=sites, min_sites=least)
    cohort = Cohort(config.federation.num_sites, records, dim, classes)
    found = plan_run(config, cohort)
    outlook = _outlook(config, cohort, seeds, public_rows, worth, cache, quiet=as_json) if simulation else {}
    facts = {**_facts(found), **outlook}
    say(json.dumps(facts, indent=2) if as_json else _text(config, found, facts))


def _facts(found: RunPlan) -> dict[str, Any]:
    """The plan as JSON values."""
    plan, cohort = found.plan, found.cohort
    waiting = _waiting(cohort.sites) * plan.num_rounds
    return {
        "sites": cohort.sites,
        "records_per_site": cohort.records,
        "noise_multiplier_training": plan.training_noise,
        "noise_multiplier_statistics": plan.statistics_noise,
        "delta": plan.delta,
        "steps": (plan.num_rounds + plan.spare_rounds) * plan.steps_per_round,
        "epsilon": [
            {"after": point.label, "pld": point.pld, "prv": point.prv, "rdp": point.rdp} for point in found.epsilons
        ],
        "signal": [
            {
                "release": level.label,
                "coordinates": level.coordinates,
                "noise_std": level.noise_std,
                "largest_signal_rms": level.signal_rms,
                "signal_over_noise": level.ratio if math.isfinite(level.ratio) else None,
            }
            for level in found.levels
        ],
        "bytes_up_per_site": found.bytes_up,
        "bytes_down_per_site": found.bytes_down,
        "seconds_of_computing_per_site": found.step_seconds * plan.num_rounds,
        "seconds_of_flower": waiting,
    }


def _outlook(
    config: RunConfig, cohort: Cohort, seeds: int, rows: int, worth: float, cache: Path, *, quiet: bool
) -> dict[str, Any]:
    """The expected score and the smallest cohort, or why there are none."""

    from common.assurance.expected_scores import simulate_noise, smallest_cohort
    from common.methods import get_method
    from embeddings.simulation.simulated import load_pool, pool_path

    if get_method(config.method).law is None:
        return {"no_score": f"{config.method} publishes a head, not a set: nothing to simulate"}
    if not pool_path(cache).is_file():
        return {
            "no_score": f"no expected score: there are no public embeddings in {cache}; run `fedhypevae demo` once, or "
            "name the folder with --cache"
        }
    train, test, shown = _public(load_pool(cache), cohort, rows)
    printed = console(stderr=True)
    printed.quiet = quiet
    with printed.status("simulating with public images") as status:

        def tell(text: str) -> None:
            status.update(said(f"simulating with public images: {text}"))

        found = simulate_noise(config, shown, train, test, seeds=range(seeds), progress=tell)
        wanted = worth * found.noiseless.balanced_accuracy
        least = smallest_cohort(config, shown, train, test, wanted=wanted, progress=tell)
    return {
        "score": {
            "data": f"{train.labels.shape[0]} public CT images, {shown.num_classes} classes, width {shown.dim}",
            "synthetic_only": _both(found.synthetic),
            "spread_over_seeds": found.spread,
            "without_noise": _both(found.noiseless),
            "one_site_by_itself": _both(found.local),
            "records_of_that_site": min(cohort.records, train.labels.shape[0]),
        },
        "worth_it_from_records_per_site": least,
        "worth_it_means_balanced_accuracy": wanted,
    }


def _public(pool: Any, cohort: Cohort, rows: int) -> tuple[SiteData, SiteData, Cohort]:
    """Public records to train and to score on; projected at random to the run's width where that is smaller."""
    from dataclasses import replace

    import torch

    from common.records import SiteData

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(pool), generator=generator)
    embeddings, labels = torch.from_numpy(pool.embeddings)[order], torch.from_numpy(pool.labels)[order]
    width = min(cohort.dim, pool.dimension)
    if width < pool.dimension:
        embeddings = embeddings @ torch.randn(pool.dimension, width, generator=generator) / math.sqrt(width)
    held_out = min(round(_HELD_OUT * len(pool)), len(pool) - 1)
    train = SiteData(embeddings[held_out:][:rows], labels[held_out:][:rows])
    test = SiteData(embeddings[:held_out], labels[:held_out])
    return train, test, replace(cohort, dim=width, num_classes=pool.num_classes)


def _text(config: RunConfig, found: RunPlan, facts: dict[str, Any]) -> str:
    """The plan for a person to read."""
    plan, cohort = found.plan, found.cohort
    lines = [
        f"{config.method}: {cohort.sites} sites of {cohort.records}, epsilon {config.privacy.epsilon:g} at delta "
        f"{plan.delta:g} for adding or removing one {config.privacy.unit}; nothing is spent by this command.",
        "",
        f"noise multiplier   training {_number(plan.training_noise)}   statistics {_number(plan.statistics_noise)}   "
        f"(sampling rate {plan.sampling_rate:g}, {facts['steps']} steps with spare rounds, clip norm "
        f"{config.privacy.clip_norm:g})",
        "",
        f"{'epsilon after':24}{'PLD':>9}{'PRV':>9}{'RDP':>9}",
        *(f"{point.label:24}{point.pld:9.3f}{point.prv:9.3f}{point.rdp:9.3f}" for point in found.epsilons),
        "",
        f"{'one coordinate of':24}{'noise':>12}{'signal':>12}{'ratio':>9}   signal is the largest there can be",
        *(
            f"{level.label:24}{level.noise_std:12.4g}{level.signal_rms:12.4g}{level.ratio:9.2f}   "
            f"({level.coordinates:,} coordinates)"
            for level in found.levels
        ),
        "",
        f"bytes of each site   up {found.bytes_up:,}   down {found.bytes_down:,}",
        f"time                 about {facts['seconds_of_computing_per_site']:.0f} s of computing at a site (as on this "
        f"machine), {facts['seconds_of_flower']:.0f} s of Flower over TLS",
        "",
    ]
    if "no_score" in facts:
        return "\n".join([*lines, facts["no_score"]])
    if "score" not in facts:
        return "\n".join(lines).rstrip()
    score = facts["score"]
    lines.append(f"expected score (accuracy / balanced accuracy), from {score['data']}:")
    for key in ("synthetic_only", "without_noise", "one_site_by_itself"):
        both = score[key]
        beside = {
            "synthetic_only": f"   +- {score['spread_over_seeds']:.3f} over seeds",
            "one_site_by_itself": f"   a head trained on {score['records_of_that_site']} public images",
        }.get(key, "")
        lines.append(f"  {key.replace('_', ' '):22}{both['accuracy']:.3f} / {both['balanced_accuracy']:.3f}{beside}")
    lines.append(f"worth it             {_worth(facts, cohort.sites)}")
    return "\n".join(lines)


def _both(score: Any) -> dict[str, float]:
    return {"accuracy": score.accuracy, "balanced_accuracy": score.balanced_accuracy}


def _worth(facts: dict[str, Any], sites: int) -> str:
    """Whom a run would serve, by the scores that stand above."""
    score, wanted = facts["score"], facts["worth_it_means_balanced_accuracy"]
    alone, together = score["one_site_by_itself"]["balanced_accuracy"], score["synthetic_only"]["balanced_accuracy"]
    least = facts["worth_it_from_records_per_site"]
    if alone >= together:
        return (
            f"not to a site with as many records of every class: by itself it has balanced accuracy {alone:.3f}, with "
            f"the set alone {together:.3f}; it may be to one that lacks classes, or has no records"
        )
    if least is None:
        return f"at no size tried: balanced accuracy {wanted:.3f} is not reached"
    return f"from about {least:,} records at each of {sites} sites (balanced accuracy {wanted:.3f})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _waiting(sites: int) -> float:
    """Seconds a round waits for Flower, on a line through what was measured with three and ten sites."""
    slope = (_MANY_S - _FEW_S) / (_MANY_SITES - _FEW_SITES)
    return max(_FEW_S + slope * (sites - _FEW_SITES), _FEW_S)
