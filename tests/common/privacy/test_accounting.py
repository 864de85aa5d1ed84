"""Calibration: never above ε, close below it, the known values, and clear refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.privacy.calibration import calibrate_noise_multiplier, gaussian_dp_parameter, round_up, split_budget
from common.privacy.composition import epsilon_pld
from common.privacy.events import gaussian, sampled_gaussian

RATE_128 = 128 / 1613


@pytest.mark.parametrize(("epsilon", "delta", "sigma"), [(1.0, 1e-4, 3.186), (1.0, 1e-5, 3.73), (3.0, 1e-5, 1.391)])
def test_calibration_of_one_gaussian_release_has_the_known_value(epsilon: float, delta: float, sigma: float) -> None:
    assert calibrate_noise_multiplier(epsilon, delta, 1.0, 1) == pytest.approx(sigma, abs=2e-3)
    assert 1.0 / gaussian_dp_parameter(epsilon, delta) == pytest.approx(sigma, abs=1e-3)


@pytest.mark.parametrize(
    ("rate", "steps", "sigma"), [(RATE_128, 50, 2.11), (RATE_128, 3250, 14.69), (512 / 1613, 50, 7.42)]
)
def test_calibration_of_sampled_steps_is_just_below_the_looser_prv_value(rate: float, steps: int, sigma: float) -> None:
    assert 0.975 * sigma < calibrate_noise_multiplier(1.0, 1e-4, rate, steps) <= sigma


@pytest.mark.slow
@given(
    epsilon=st.floats(0.05, 20.0),
    log_delta=st.floats(-8.0, -2.0),
    log_rate=st.floats(-2.5, 0.0),
    log_steps=st.floats(0.0, 3.5),
)
@settings(max_examples=25)
def test_calibrated_noise_never_overshoots_epsilon(
    epsilon: float, log_delta: float, log_rate: float, log_steps: float
) -> None:
    delta, rate, steps = 10.0**log_delta, 10.0**log_rate, round(10.0**log_steps)
    sigma = calibrate_noise_multiplier(epsilon, delta, rate, steps)
    found = epsilon_pld([sampled_gaussian(sigma, rate, count=steps)], delta)
    assert found <= epsilon
    # Tight, unless already the least noise that calibration gives, or the ε curve ends at zero with a jump.
    assert found >= 0.99 * epsilon or sigma == 0.1 or found == 0.0


def test_calibration_counts_the_extra_events() -> None:
    extra = (gaussian(5.0),)
    sigma = calibrate_noise_multiplier(1.0, 1e-4, RATE_128, 50, extra)
    assert sigma > calibrate_noise_multiplier(1.0, 1e-4, RATE_128, 50)
    assert 0.99 <= epsilon_pld([*extra, sampled_gaussian(sigma, RATE_128, count=50)], 1e-4) <= 1.0


def test_calibration_is_monotone() -> None:
    def sigmas(cases: list[tuple[float, float, float, int]]) -> list[float]:
        return [calibrate_noise_multiplier(*case) for case in cases]

    for rising in (
        sigmas([(epsilon, 1e-5, 0.05, 100) for epsilon in (8.0, 3.0, 1.0, 0.5)]),
        sigmas([(1.0, delta, 0.05, 100) for delta in (1e-3, 1e-5, 1e-7)]),
        sigmas([(1.0, 1e-5, rate, 100) for rate in (0.01, 0.1, 0.5, 1.0)]),
        sigmas([(1.0, 1e-5, 0.05, steps) for steps in (10, 100, 1000)]),
    ):
        assert rising == sorted(rising)
        assert len(set(rising)) == len(rising)


def test_calibration_refuses_extra_events_that_use_everything() -> None:
    with pytest.raises(ConfigError, match="extra events alone"):
        calibrate_noise_multiplier(1.0, 1e-5, 0.1, 10, (gaussian(3.0),))


def test_calibration_refuses_what_no_noise_can_reach() -> None:
    with pytest.raises(ConfigError, match="fewer steps"):
        calibrate_noise_multiplier(1e-4, 1e-9, 1.0, 10**7)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", -1.0),
        ("epsilon", math.inf),
        ("epsilon", math.nan),
        ("delta", 0.0),
        ("delta", 1.0),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.1),
        ("num_steps", 0),
        ("num_steps", 1.5),
        ("statistics_share", 1.0),
        ("statistics_share", -0.1),
        ("statistics_share", math.nan),
        ("statistics_share", None),
    ],
)
def test_split_budget_refuses_values_out_of_range(argument: str, value: Any) -> None:
    arguments: dict[str, Any] = {
        "epsilon": 1.0,
        "delta": 1e-5,
        "sampling_rate": 0.1,
        "num_steps": 10,
        "statistics_share": 0.3,
    }
    arguments[argument] = value
    with pytest.raises(ConfigError, match="expected"):
        split_budget(**arguments)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.99])
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-4), (8.0, 1e-6)])
def test_split_budget_uses_epsilon_up_to_one_percent(epsilon: float, delta: float, share: float) -> None:
    statistics, training = split_budget(epsilon, delta, RATE_128, 50, share)
    assert statistics is not None
    together = [gaussian(statistics), sampled_gaussian(training, RATE_128, count=50)]
    assert 0.99 * epsilon <= epsilon_pld(together, delta) <= epsilon
    # The statistics alone use their share of μ².
    assert (1.0 / statistics) ** 2 == pytest.approx(share * gaussian_dp_parameter(epsilon, delta) ** 2, rel=1e-3)


def test_split_budget_without_statistics_is_calibration_alone() -> None:
    statistics, training = split_budget(1.0, 1e-4, RATE_128, 50, 0.0)
    assert statistics is None
    assert training == calibrate_noise_multiplier(1.0, 1e-4, RATE_128, 50)


def test_split_budget_of_two_gaussian_releases_adds_squares() -> None:
    # One training step at rate 1 is a Gaussian too: 1/σ_s² + 1/σ_t² = μ², and half each means σ_s = σ_t.
    statistics, training = split_budget(1.0, 1e-5, 1.0, 1, 0.5)
    assert statistics == pytest.approx(3.7305 * math.sqrt(2.0), rel=1e-3)
    assert training == pytest.approx(3.7305 * math.sqrt(2.0), rel=5e-3)


@given(st.floats(1e-6, 1e9))
def test_round_up_never_rounds_down_and_keeps_five_digits(value: float) -> None:
    rounded = round_up(value)
    assert value <= rounded <= value * (1.0 + 1.01e-4)
    assert float(f"{rounded:.4e}") == rounded
    assert round_up(rounded) == rounded
