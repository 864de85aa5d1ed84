"""What secure aggregation sums in a run: the public arguments of each release, and its sum as the methods take it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from common.errors import ConfigError
from common.methods.base import Method, RunContext, Tensors
from common.methods.constants import known_total
from common.methods.site_release import statistics_batch
from common.privacy.combined import ReleasedStatistics, combine_statistics
from common.privacy.mechanism import planned_noise
from common.privacy.noise import NoiseSource
from common.privacy.statistics import StatisticsSpec, part_weights, statistics_sum
from common.records import SiteData
from common.secagg.assumptions import Assumptions
from common.secagg.quantise import Quantisation, Words, decode, encode, make_quantisation

# Before the statistics nobody knows how many units there are: room for so many full contributions at one site.
_UNITS_BEFORE_STATISTICS = 2.0**17
# Room over the released total of all sites, which is noised, at each site.
_ROOM = 2.0


def assumptions_of(context: RunContext) -> Assumptions:
    """What the run assumes of its sites (ConfigError: too few of them)."""
    return context.config.privacy.assumptions(context.problem.num_sites)


def check_shares_noise(method: Method, context: RunContext) -> None:
    """Refuse a run whose noise can't be shared.

    Raises:
        ConfigError: the method's sites depend on what they send, or the number of sites does not allow it.
    """
    if not method.shares_noise or method.broadcast is not None or method.site_upload_shapes is not None:
        raise ConfigError(
            f"method {method.name} can't run under trust secagg: its sites need their own noise; use local"
        )
    assumptions_of(context)


def training_arguments(context: RunContext, method: Method, params: Tensors) -> Quantisation:
    """Public arguments of one round's sum: sensitivity C, multiplier of the plan.

    Args:
        context: the run.
        method: what is trained.
        params: what the sites received; the released total of units is in it, or public.

    Raises:
        ConfigError: no training, or a total that makes no sense.
    """
    if context.plan.training_noise is None:
        raise ConfigError("the run trains nothing: there is no sum to aggregate")
    total = known_total(params, context.config.federation.public_total)
    return make_quantisation(
        method.upload_shapes(context),
        context.config.privacy.clip_norm,
        _ROOM * max(total, 1.0),
        context.plan.training_noise,
        assumptions_of(context),
    )


def statistics_arguments(context: RunContext, spec: StatisticsSpec) -> Quantisation:
    """Public arguments of the statistics' sum: weighted parts, sensitivity of the whole vector."""
    if context.plan.statistics_noise is None:
        raise ConfigError("the run has no statistics to aggregate")
    noise, assumptions = context.plan.statistics_noise, assumptions_of(context)
    return make_quantisation(spec.shapes, spec.sensitivity, _UNITS_BEFORE_STATISTICS, noise, assumptions)


def statistics_vector(context: RunContext, spec: StatisticsSpec, data: SiteData, source: NoiseSource) -> Words:
    """One site's statistics as integers with its share of the noise, to be masked.

    Returns:
        (D,) uint64. Summed over the sites: one Gaussian release with the plan's multiplier, for adding or removing one
        unit.
    """
    summed = statistics_sum(spec, statistics_batch(context, data, source))
    return encode(statistics_arguments(context, spec), summed.tensors, source)


def mean_statistics(context: RunContext, spec: StatisticsSpec, total: Words, num_summed: int) -> dict[str, Tensor]:
    """The sum of the sites' statistics as an equal part of it for each; post-processing.

    Args:
        context: the run.
        spec: what was released.
        total: (D,) uint64, the sum modulo 2^b.
        num_summed: how many sites are in it.
    """
    arguments, weights = statistics_arguments(context, spec), part_weights(spec)
    return {name: value / weights[name] for name, value in decode(arguments, total, num_summed).items()}


def shared_statistics_noise(context: RunContext) -> float:
    """Noise multiplier of one site's share of the statistics' noise."""
    return planned_noise(context.plan.statistics_noise) * assumptions_of(context).share


def combined_statistics(context: RunContext, spec: StatisticsSpec, total: Words, num_summed: int) -> ReleasedStatistics:
    """The statistics of all sites from their sum; post-processing. Args as `mean_statistics`."""
    mean = mean_statistics(context, spec, total, num_summed)
    return combine_statistics(spec, [mean] * num_summed, shared_statistics_noise(context))


def mean_uploads(arguments: Quantisation, total: Words, indices: Iterable[int]) -> dict[int, Tensors]:
    """The sum as the methods take uploads: an equal part of it for each site that is in it."""
    sites = list(indices)
    mean = decode(arguments, total, len(sites))
    return dict.fromkeys(sites, mean)
