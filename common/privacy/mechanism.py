"""The one noised sum of all private methods, and the refusal where a plan names no noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.devices import sent_to
from common.errors import ConfigError, DataError
from common.privacy.clipping import ClippedSum
from common.privacy.noise import NoiseSource, add_gaussian_array, check_std, noise_grid


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


def noise_std(noise_multiplier: float | None, sensitivity: float) -> float:
    """Standard deviation of a release's noise, σ times its sensitivity; ConfigError as `planned_noise`."""
    noise = planned_noise(noise_multiplier)
    # a sum that nothing clips has no sensitivity to multiply
    return noise * sensitivity if noise > 0 else 0.0


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
    # Eq. (9), the noise
    noised = add_gaussian(summed.tensors, noise_std(noise_multiplier, summed.sensitivity), source)
    # sums of many units come in float64, and are rounded to what the method computes in once they are noised
    return {name: value.to(torch.get_default_dtype()) for name, value in noised.items()}


def add_gaussian(tensors: Mapping[str, Tensor], std: float, source: NoiseSource) -> dict[str, Tensor]:
    """Noise the clipped sums of one release: add N(0, std²) to every coordinate, then round to a grid.

    Args:
        tensors: name -> sum over the sampled units, any shapes and floating dtypes; the L2 sensitivity of
            *all of them as one vector*, for adding or removing one unit, is what `std` was computed from.
        std: noise multiplier times that sensitivity, finite and >= 0; 0 adds nothing and is not private.
        source: where the noise comes from.

    Returns:
        name -> noisy sum, with the shape, dtype and device of its input; a Gaussian mechanism with standard
        deviation `std` for adding or removing one unit, rounded afterwards.

    Raises:
        ConfigError: the standard deviation is negative or not finite.
        DataError: a sum is not finite, which no clipped sum is; no value is quoted, and no noise of that release is
            used again.
    """
    check_std(std)
    if any(tensor.device.type != "cpu" for tensor in tensors.values()):
        return _add_on_device(tensors, std, source)
    _check_finite(tensors)
    if std == 0.0:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    noisy = {}
    for name in sorted(tensors):  # one order, whatever order the caller built the mapping in
        tensor = tensors[name].detach()
        values = add_gaussian_array(tensor.to(device="cpu", dtype=torch.float64).numpy(), std, source)
        noisy[name] = torch.from_numpy(values).to(dtype=tensor.dtype, device=tensor.device)
    return {name: noisy[name] for name in tensors}


def _add_on_device(tensors: Mapping[str, Tensor], std: float, source: NoiseSource) -> dict[str, Tensor]:
    """As `add_gaussian`, to all sums at once and the same numbers: float64 addition and rounding are exact everywhere.

    The device is waited for once, at the end.
    """
    names = sorted(tensors)
    total = torch.cat([tensors[name].detach().double().flatten() for name in names])
    finite = torch.isfinite(total).all()
    if std > 0.0:
        total += sent_to(total.device, torch.from_numpy(source.gaussian(total.numel(), std)))
        grid = noise_grid(std)
        total.mul_(1.0 / grid).round_().mul_(grid)
    parts = dict(zip(names, total.split([tensors[name].numel() for name in names]), strict=True))
    noisy = {name: parts[name].view(tensor.shape).to(tensor.dtype) for name, tensor in tensors.items()}
    if not bool(finite):
        _check_finite(tensors)
    return noisy


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"sum {name!r}: expected finite numbers, found NaN or infinity; nothing was released")
