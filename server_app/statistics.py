"""The one-shot statistics of a run: asked for before its first round, held against what honest sites can send."""

from __future__ import annotations

from collections.abc import Callable

from flwr.serverapp import Grid

from common.errors import WireError
from common.methods.base import Method, RunContext
from common.methods.shared_sums import mean_statistics, shared_statistics_noise, statistics_arguments
from common.privacy.combined import ReleasedStatistics, combine_statistics
from common.privacy.robust import settled
from common.privacy.statistics import StatisticsSpec
from server_app.link import Link
from server_app.secagg import SecureSum
from server_app.statistics_bounds import StatisticsBounds


def collect_statistics(
    grid: Grid, link: Link, method: Method, context: RunContext, save: Callable[[], None]
) -> ReleasedStatistics | None:
    """Ask all sites for their noised statistics, or for the masked sum of them.

    Args:
        grid: the link to the sites.
        link: speaks with them, and keeps count.
        method: what is trained.
        context: the run.
        save: writes the progress down, after an attempt at a sum that failed.

    Returns:
        The statistics of all sites together; None for a method without.

    Raises:
        FederationError: too few sites answered, or their sum is one that honest sites don't have.
    """
    spec, noise = method.statistics(context), context.plan.statistics_noise
    if spec is None or noise is None:
        return None
    if context.config.privacy.trust == "secagg":
        summed = link.secure_sum(grid, "statistics", statistics_arguments(context, spec), save)
        return _checked_sum(link, context, spec, summed)
    bounds = StatisticsBounds.of(context.config, spec, noise)
    outcome = link.ask(grid, "statistics", lambda _: {}, spec.shapes, check=bounds.check)
    by_index = {link.members[node].index: reply.tensors for node, reply in outcome.replies.items()}
    sites = sorted(by_index)
    releases = settled(context.config.federation.robust_statistics, [by_index[index] for index in sites])
    return combine_statistics(spec, releases, noise, sites)


def _checked_sum(link: Link, context: RunContext, spec: StatisticsSpec, summed: SecureSum) -> ReleasedStatistics:
    """The statistics from a sum of the sites' (FederationError: honest sites have no such sum)."""
    sites, share = len(summed.nodes), shared_statistics_noise(context)
    mean = mean_statistics(context, spec, summed.total, sites)
    bounds = StatisticsBounds.of(context.config, spec, share, sites=sites)
    try:
        bounds.check({name: value * sites for name, value in mean.items()})
    except WireError as error:
        link.refuse_sum("statistics", error)
    return combine_statistics(spec, [mean] * sites, share)
