"""A federation in one process: the same pure functions as under Flower, without network, ledger or disk.

For benchmarks and tests, where a hundred sites or a thousand rounds must be cheap.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

from common.config.run import RunConfig
from common.methods import get_method, method_of
from common.methods.base import Artifact, Method, Problem, RunContext, ServerState, SiteState, StepInput, Tensors
from common.methods.shared_sums import (
    check_shares_noise,
    combined_statistics,
    mean_uploads,
    statistics_arguments,
    statistics_vector,
    training_arguments,
)
from common.methods.site_release import noise_source, site_statistics
from common.methods.uploads import gather
from common.names import Task
from common.privacy.combined import ReleasedStatistics, combine_statistics
from common.privacy.robust import settled
from common.records import SiteData, unit_length
from common.secagg.quantise import add_up, encode
from common.wire.allow_list import num_bytes


@dataclass(frozen=True)
class LoopResult:
    """What a run in one process gives.

    Attributes:
        context: configuration, problem and privacy plan.
        state: the server's last state.
        sites: each site's private state.
        artifact: what is published.
        bytes_up: values that one site sends in the whole run, in bytes, on average; without headers.
        bytes_down: the same of what it receives.
    """

    context: RunContext
    state: ServerState
    sites: tuple[SiteState, ...]
    artifact: Artifact
    bytes_up: float = 0.0
    bytes_down: float = 0.0


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
    # one site after the other: memory does not grow with them
    releases = (
        site_statistics(context, spec, noise, data, source) for data, source in zip(sites, sources, strict=True)
    )
    return combine_statistics(
        spec, settled(context.config.federation.robust_statistics, releases), noise, range(len(sites))
    )


def problem_of(sites: Sequence[SiteData], class_names: Sequence[str], task: Task = "multiclass") -> Problem:
    """The public facts of these sites; each one's width where they differ."""
    dims = tuple(site.embeddings.shape[1] for site in sites)
    return Problem(dims[0], tuple(class_names), len(sites), dims if len(set(dims)) > 1 else (), task)


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
        class_names: names of the classes, findings or grades.
        progress: called after every round with its number and the server's state.

    Returns:
        The result. No ledger is charged: anybody who calls this owns all the data.
    """
    method = method_of(config)
    problem = problem_of(sites, class_names, config.federation.task)
    return run_context(RunContext(config, problem, method.plan(config)), sites, progress)


def run_context(
    context: RunContext, sites: Sequence[SiteData], progress: Callable[[int, ServerState], None] | None = None
) -> LoopResult:
    """As `run_loop`, with a plan that is made already."""
    config, method = context.config, get_method(context.config.method)
    sites = [unit_length(site) for site in sites]
    state = method.init(context)
    site_states = [method.init_site(context, index) for index in range(len(sites))]
    shared = config.privacy.trust == "secagg"
    if shared:
        check_shares_noise(method, context)
    statistics = run_statistics(context, method, sites)
    up, down = 0, 0
    if statistics is not None:
        state = method.prepare(context, state, statistics)
        up += len(sites) * _statistics_bytes(context, method)
    for round_index in range(context.plan.num_rounds):
        uploads: MutableMapping[int, Tensors] = gather(method, context, state)
        vectors = []
        for index, data in enumerate(sites):
            source = noise_source(config, index, round_index)
            params = method.params_for(context, state, index)
            down += sum(value.nbytes for value in params.values())
            work = StepInput(params, site_states[index], data, round_index, index, source, noised_later=shared)
            site_states[index], released = method.client_step(context, work)
            if shared:
                arguments = training_arguments(context, method, params)
                vectors.append(encode(arguments, released, source))
                up += arguments.num_bytes
            else:
                uploads[index] = released
                up += sum(value.nbytes for value in released.values())
        if shared:
            arguments = training_arguments(context, method, method.params_for(context, state, 0))
            uploads = mean_uploads(arguments, add_up(vectors, arguments.bits), range(len(sites)))
        state = method.server_step(context, state, uploads)
        if progress is not None:
            progress(round_index + 1, state)
    artifact = method.finish(context, state)
    return LoopResult(context, state, tuple(site_states), artifact, up / len(sites), down / len(sites))


def _statistics_bytes(context: RunContext, method: Method) -> int:
    spec = method.statistics(context)
    if spec is None:
        return 0
    if context.config.privacy.trust == "secagg":
        return statistics_arguments(context, spec).num_bytes
    return num_bytes(spec.shapes)
