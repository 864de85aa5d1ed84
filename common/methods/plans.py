"""How a run's budget becomes noise: the plans that methods share."""

from __future__ import annotations

import math

from common.config.run import RunConfig
from common.methods.base import PrivacyPlan


def private_plan(config: RunConfig) -> PrivacyPlan:
    """Divide the run's budget between statistics and training, by the accountant (see `calibration.split_budget`).

    Args:
        config: its `privacy` and `training` parts.

    Returns:
        The plan; its events together have ε at most `privacy.epsilon`. Noise 0 where ε is infinite.
    """
    from common.privacy.calibration import calibrate_noise_multiplier, split_budget

    privacy, training = config.privacy, config.training
    spare = privacy.spare_rounds if training.num_rounds else 0
    steps = (training.num_rounds + spare) * training.local_steps
    statistics: float | None
    noise: float | None
    if not math.isfinite(privacy.epsilon):
        statistics, noise = (0.0 if privacy.statistics_share > 0 else None), (0.0 if steps else None)
    elif steps == 0:
        statistics = calibrate_noise_multiplier(privacy.epsilon, privacy.delta, 1.0, 1)
        noise = None
    else:
        statistics, noise = split_budget(
            privacy.epsilon, privacy.delta, privacy.sampling_rate, steps, privacy.statistics_share
        )
    return PrivacyPlan(
        statistics, noise, privacy.sampling_rate, training.local_steps, training.num_rounds, privacy.delta, spare
    )


def nonprivate_plan(config: RunConfig) -> PrivacyPlan:
    """No noise at all: its events have infinite ε, so that no ledger takes them for something else."""
    statistics = 0.0 if config.privacy.statistics_share > 0 else None
    training = config.training
    noise = 0.0 if training.num_rounds else None
    return PrivacyPlan(statistics, noise, 1.0, 1, training.num_rounds, config.privacy.delta)
