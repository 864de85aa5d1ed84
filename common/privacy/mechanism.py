"""The one noised sum of all private methods, and the refusal where a plan names no noise."""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import ConfigError
from common.privacy.clipping import ClippedSum
from common.privacy.noise import NoiseSource, add_gaussian


def planned_noise(noise_multiplier: float | None) -> float:
    """The noise multiplier that a plan names for a release; 0 where the plan itself promises nothing.

    Raises:
        ConfigError: the plan names none. Nothing is released then.
    """
    if noise_multiplier is None:
        raise ConfigError(
            "the plan names no noise multiplier for this release: expected a number of at least 0, found none; "
            "nothing was released, plan the run again"
        )
    return noise_multiplier


def noised_sum(summed: ClippedSum, noise_multiplier: float | None, source: NoiseSource) -> dict[str, Tensor]:
    """Add Gaussian noise of standard deviation σ times the sum's sensitivity (Eq. 9).

    Args:
        summed: a clipped sum over units, with its sensitivity as one vector.
        noise_multiplier: σ of the plan, at least 0; 0 draws nothing and promises nothing.
        source: secret randomness.

    Returns:
        The noised sum, by name: one Gaussian release with multiplier σ for the sum's neighbouring relation.

    Raises:
        ConfigError: the plan names no multiplier. DataError: a sum is not finite.
    """
    noise = planned_noise(noise_multiplier)
    # Eq. (9), the noise; a sum that nothing clips has no sensitivity to multiply
    noised = add_gaussian(summed.tensors, noise * summed.sensitivity if noise > 0 else 0.0, source)
    # sums of many units come in float64, and are rounded to what the method computes in once they are noised
    return {name: value.to(torch.get_default_dtype()) for name, value in noised.items()}
