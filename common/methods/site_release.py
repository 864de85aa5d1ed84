"""What a site releases once, before training, and the source of its secret randomness."""

from __future__ import annotations

from torch import Tensor

from common.config.run import RunConfig
from common.methods.base import RunContext
from common.privacy.noise import NoiseSource, SecureNoise, TestNoise
from common.privacy.sampling import draw_units
from common.privacy.statistics import StatisticsSpec, release_statistics
from common.records import SiteData, UnitBatch, by_unit


def noise_source(config: RunConfig, site_index: int, round_index: int) -> NoiseSource:
    """The source of a site's secret randomness in a round; statistics are round -1.

    Under `noise = "test"` it is seeded, so that two ways of running the same configuration can be compared; such a run
    is not private, and says so.
    """
    if config.privacy.noise == "secure":
        return SecureNoise()
    return TestNoise(1_000_003 * config.federation.seed + 1_009 * site_index + round_index + 2)


def site_statistics(
    context: RunContext, spec: StatisticsSpec, noise_multiplier: float, data: SiteData, source: NoiseSource
) -> dict[str, Tensor]:
    """One site's noised statistics: one Gaussian event with `noise_multiplier`, over all units."""
    return release_statistics(spec, statistics_batch(context, data, source), noise_multiplier, source)


def statistics_batch(context: RunContext, data: SiteData, source: NoiseSource) -> UnitBatch:
    """All units of a site as the statistics see them: each with at most the public cap of records."""
    config = context.config
    data = by_unit(data, config.privacy.unit, context.problem.num_classes)
    return draw_units(data, 1.0, config.privacy.records_per_unit, source)
