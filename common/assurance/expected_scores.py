"""What a run would be worth, before anything is spent: an expected score, and the fewest records that reach one.

The score comes from a noise-only simulation on public records: the real method in one process, with as much noise for
each record as the planned federation would have. What it leaves out makes it an estimate: the sites' own images, their
number beyond the public ones, and differences between sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from common.assurance.plan import Cohort, noise_of_sum, planned_context
from common.config.run import RunConfig
from common.errors import ConfigError
from common.evaluation.heads import LinearHead, fit_linear_head
from common.evaluation.scores import SiteScores, mean_scores, score
from common.loop import run_context
from common.methods.base import RunContext
from common.methods.published import published_set
from common.records import SiteData, on_sphere

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Simulated:
    """Scores of a noise-only simulation, means over seeds, on held-out public records.

    Attributes:
        synthetic: of a linear head trained on the synthetic set.
        spread: standard deviation of its balanced accuracy over seeds.
        noiseless: the same without noise: what no budget could better.
        local: of a head trained on as many public records as one site has.
    """

    synthetic: SiteScores
    spread: float
    noiseless: SiteScores
    local: SiteScores


def simulate_noise(
    config: RunConfig,
    cohort: Cohort,
    train: SiteData,
    test: SiteData,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress | None = None,
) -> Simulated:
    """Expected score of a planned run, from public records with the run's noise for each record.

    Args:
        config: the run.
        cohort: who would take part; its width and classes must be those of the records.
        train: public records to train on. With n of them, one simulated site draws noise of multiplier
            σ sqrt(sites) n / N: as much for each record as the sum over the planned sites of N in all.
        test: public records to score on.
        seeds: of the repetitions.
        progress: called with what is being done.

    Returns:
        The scores: an estimate for records like these, without the differences between sites.

    Raises:
        ConfigError: the method has no samples to score.
    """
    tell = progress if progress is not None else _silent
    found = []
    for number, seed in enumerate(seeds):
        tell(f"simulation {number + 1} of {len(seeds)}")
        found.append(_simulated_score(config, cohort, train, test, seed, cohort.total))
    tell("the same without noise")
    noiseless = _simulated_score(config, cohort, train, test, seeds[0], None)
    tell("a site by itself")
    rows = torch.randperm(train.labels.shape[0], generator=torch.Generator().manual_seed(seeds[0]))[: cohort.records]
    head = fit_linear_head(on_sphere(train.embeddings[rows]), train.labels[rows], cohort.num_classes)
    balanced = torch.tensor([one.balanced_accuracy for one in found], dtype=torch.float64)
    spread = float(balanced.std(unbiased=False))
    return Simulated(mean_scores(found), spread, noiseless, score(head, on_sphere(test.embeddings), test.labels))


def smallest_cohort(
    config: RunConfig,
    cohort: Cohort,
    train: SiteData,
    test: SiteData,
    *,
    wanted: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> int | None:
    """Fewest records of each site, by powers of two, with which the expected balanced accuracy reaches `wanted`.

    Args:
        config, cohort, train, test: as for `simulate_noise`; the number of sites stays.
        wanted: balanced accuracy in [0, 1].
        seed: of the simulations.
        progress: called with what is being done.

    Returns:
        Records of each site, from 1/64 to 64 times those of `cohort`; None if not even the most suffice.
    """
    tell = progress if progress is not None else _silent
    low, high = -6, 6
    known: dict[int, bool] = {}

    def enough(power: int) -> bool:
        if power not in known:
            records = _records(cohort, power)
            tell(f"{cohort.sites} sites of {records}")
            reached = _simulated_score(config, cohort, train, test, seed, cohort.sites * records)
            known[power] = reached.balanced_accuracy >= wanted
        return known[power]

    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return _records(cohort, high)


def _records(cohort: Cohort, power: int) -> int:
    return max(1, round(cohort.records * 2.0**power))


def _simulated_score(
    config: RunConfig, cohort: Cohort, train: SiteData, test: SiteData, seed: int, total: int | None
) -> SiteScores:
    """Score of one simulation with the noise of `total` records at the cohort's sites; None: without noise."""
    _, context = planned_context(config.replace(unit="record"), cohort)
    records = train.labels.shape[0]
    share = 0.0 if total is None else noise_of_sum(context.config, cohort) * records / total
    noised = context.config.replace(num_sites=1, min_sites=1, seed=seed, noise="test", trust="local")
    plan = context.plan
    quieter = replace(
        plan,
        statistics_noise=None if plan.statistics_noise is None else plan.statistics_noise * share,
        training_noise=None if plan.training_noise is None else plan.training_noise * share,
    )
    alone = RunContext(noised, replace(context.problem, num_sites=1), quieter)
    due = published_set(alone, run_context(alone, [train]).artifact)
    if due is None:
        raise ConfigError(f"method {config.method} publishes a head: there is no synthetic set to score")
    head: LinearHead = fit_linear_head(*due.all(), num_classes=cohort.num_classes)
    return score(head, on_sphere(test.embeddings), test.labels)


def _silent(_: str) -> None:
    return None
