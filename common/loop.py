"""A federation in one process: the same pure functions as under Flower, without network, ledger or disk.

For benchmarks and tests, where a hundred sites or a thousand rounds must be cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from common.config import RunConfig
from common.methods import get_method
from common.methods.base import (
    Artifact,
    Method,
    Problem,
    RunContext,
    ServerState,
    SiteState,
    StepInput,
    Tensors,
)
from common.noise import NoiseSource, SecureNoise, TestNoise
from common.sampling import SiteData
from common.secagg.quantise import add_up, encode
from common.secagg.release import (
    check_shares_noise,
    combined_statistics,
    mean_uploads,
    statistics_arguments,
    statistics_batch,
    statistics_vector,
    training_arguments,
)
from common.statistics import ReleasedStatistics, StatisticsSpec, combine_statistics, release_statistics


@dataclass(frozen=True)
class LoopResult:
    """What a run in one process gives.

    Attributes:
        context: configuration, problem and privacy plan.
        state: the server's last state.
        sites: each site's private state.
        artifact: what is published.
    """

    context: RunContext
    state: ServerState
    sites: tuple[SiteState, ...]
    artifact: Artifact


def noise_source(config: RunConfig, site_index: int, round_index: int) -> NoiseSource:
    """The source of a site's secret randomness in a round; statistics are round -1, a baseline -2.

    Under `noise = "test"` it is seeded, so that two ways of running the same configuration can be compared; such a run
    is not private, and says so.
    """
    if config.privacy.noise == "secure":
        return SecureNoise()
    return TestNoise(1_000_003 * config.federation.seed + 1_009 * site_index + round_index + 2)


def run_statistics(context: RunContext, method: Method, sites: Sequence[SiteData]) -> ReleasedStatistics | None:
    """The one-shot release of every site, combined; None if the method has none."""
    spec, noise = method.statistics(context), context.plan.statistics_noise
    if spec is None or noise is None:
        return None
    sources = [noise_source(context.config, index, -1) for index in range(len(sites))]
    if context.config.privacy.trust == "secagg":
        arguments = statistics_arguments(context, spec)
        pairs = zip(sites, sources, strict=True)
        vectors = [statistics_vector(context, spec, data, source) for data, source in pairs]
        return combined_statistics(context, spec, add_up(vectors, arguments.bits), len(sites))
    releases = [
        site_statistics(context, spec, noise, data, source) for data, source in zip(sites, sources, strict=True)
    ]
    return combine_statistics(spec, releases, noise)


def site_statistics(
    context: RunContext, spec: StatisticsSpec, noise_multiplier: float, data: SiteData, source: NoiseSource
) -> dict[str, Tensor]:
    """One site's noised statistics: one Gaussian event with `noise_multiplier`, over all units."""
    return release_statistics(spec, statistics_batch(context.config, data, source), noise_multiplier, source)


def problem_of(sites: Sequence[SiteData], class_names: Sequence[str]) -> Problem:
    """The public facts of these sites; each one's width where they differ."""
    dims = tuple(site.embeddings.shape[1] for site in sites)
    return Problem(dims[0], tuple(class_names), len(sites), dims if len(set(dims)) > 1 else ())


def run_loop(
    config: RunConfig,
    sites: Sequence[SiteData],
    class_names: Sequence[str],
    progress: Callable[[int, ServerState], None] | None = None,
) -> LoopResult:
    """Run a whole federation in this process.

    Args:
        config: the run; `num_sites` must be the number of sites given.
        sites: what each site trains on.
        class_names: names of the classes.
        progress: called after every round with its number and the server's state.

    Returns:
        The result. No ledger is charged: whoever calls this owns all the data.
    """
    method = get_method(config.method)
    problem = problem_of(sites, class_names)
    context = RunContext(config, problem, method.plan(config))
    state = method.init(context)
    site_states = [method.init_site(context, index) for index in range(len(sites))]
    shared = config.privacy.trust == "secagg"
    if shared:
        check_shares_noise(method, context)
    statistics = run_statistics(context, method, sites)
    if statistics is not None:
        state = method.prepare(context, state, statistics)
    for round_index in range(context.plan.num_rounds):
        uploads: dict[int, Tensors] = {}
        vectors = []
        for index, data in enumerate(sites):
            source = noise_source(config, index, round_index)
            params = method.params_for(context, state, index)
            work = StepInput(params, site_states[index], data, round_index, index, source, noised_later=shared)
            site_states[index], uploads[index] = method.client_step(context, work)
            if shared:
                vectors.append(encode(training_arguments(context, method, params), uploads[index], source))
        if shared:
            arguments = training_arguments(context, method, state.params)
            uploads = mean_uploads(arguments, add_up(vectors, arguments.bits), range(len(sites)))
        state = method.server_step(context, state, uploads)
        if progress is not None:
            progress(round_index + 1, state)
    return LoopResult(context, state, tuple(site_states), method.finish(context, state))
