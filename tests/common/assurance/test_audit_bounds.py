"""Bounds of audits against laws with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.assurance.audit_bounds import (
    one_run_epsilon,
    one_run_power,
    one_run_pvalue,
    one_run_scores_epsilon,
    proportion_bounds,
    two_world_mu,
    two_world_power,
)
from common.errors import ConfigError


def test_proportion_bounds_by_hand() -> None:
    # no success in n trials: upper bound 1 - (1 - confidence)^(1/n); all successes: the mirror image
    assert proportion_bounds(0, 10, 0.95) == (0.0, pytest.approx(1 - 0.05**0.1))
    assert proportion_bounds(10, 10, 0.95) == (pytest.approx(0.05**0.1), 1.0)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_two_world_mu_stays_below_the_truth_and_comes_close(rate: float) -> None:
    bounds = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        without = generator.standard_normal(5000)
        with_unit = generator.standard_normal(5000) + 1.0 * (generator.random(5000) < rate)
        bounds.append(two_world_mu(without, with_unit, rate, 0.999))
    assert max(bounds) <= 1.0
    assert np.median(bounds) > (0.8 if rate == 1.0 else 0.5)


def test_two_world_mu_has_no_tail_of_unlucky_thresholds() -> None:
    bounds = []
    for seed in range(150):
        without, with_unit = np.random.default_rng(seed).standard_normal((2, 10_000))
        bounds.append(two_world_mu(without, with_unit + 1.0, 1.0, 0.999))
    assert min(bounds) > 0.83  # 0.9 less 3.5 standard deviations of the draws that judge


def test_two_world_mu_sees_a_unit_that_its_pilot_saw_too_seldom_for_a_bound() -> None:
    """The unit shows far out in 6 of 50 draws of the pilot, which prove nothing, and in half of the others."""
    without = 0.1 * np.random.default_rng(3).standard_normal(250)
    with_unit = without.copy()
    with_unit[:6] += 10.0
    with_unit[50:150] += 10.0
    assert two_world_mu(without, with_unit, 0.5, 0.999) > 1.0


def test_two_world_mu_of_equal_worlds_is_about_zero() -> None:
    generator = np.random.default_rng(0)
    assert two_world_mu(generator.standard_normal(2000), generator.standard_normal(2000), 1.0, 0.999) < 0.05
    with pytest.raises(ConfigError, match="at least 50 draws"):
        two_world_mu(np.zeros(10), np.ones(10), 1.0, 0.999)


def test_two_world_power_is_what_draws_show() -> None:
    factor = two_world_power(1.0, 1.0, 10_000, 0.999)
    assert 0.85 < factor < 0.97
    generator = np.random.default_rng(1)
    noise = generator.standard_normal((2, 10_000)) * (factor - 0.03)
    assert two_world_mu(noise[0], noise[1] + 1.0, 1.0, 0.999) > 1.0
    assert two_world_power(15.0, 1.0, 1000, 0.999) < factor


def test_one_run_pvalue_by_hand() -> None:
    # ε = 0, δ = 0: fair coins
    assert one_run_pvalue(10, 10, 10, 0.0, 0.0) == pytest.approx(2**-10)
    assert one_run_pvalue(0, 10, 10, 0.0, 0.0) == 1.0
    # ε = ln 3: each guess right with probability 3/4
    assert one_run_pvalue(4, 4, 4, math.log(3), 0.0) == pytest.approx(0.75**4)
    # δ adds 2 m δ max_i P[v - i <= B < v] / i; for one guess that is P[B = 0] = 1/2
    assert one_run_pvalue(1, 1, 1, 0.0, 0.01) == pytest.approx(0.5 + 2 * 0.01 * 0.5)


def test_one_run_epsilon_bounds_randomised_response() -> None:
    """Randomised response at ε says the truth with probability e^ε / (1 + e^ε): the bound may not exceed ε."""
    epsilon, bounds = 1.0, []
    for seed in range(100):
        correct = int(np.random.default_rng(seed).binomial(1000, 1 / (1 + math.exp(-epsilon))))
        bounds.append(one_run_epsilon(correct, 1000, 1000, 0.0, 0.99))
    assert np.mean(np.array(bounds) <= epsilon) >= 0.95
    assert np.median(bounds) > 0.75


def test_one_run_scores_find_what_is_there_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    included = generator.random(1000) < 0.5
    noise = generator.standard_normal(1000)
    assert one_run_scores_epsilon(noise, included, 1e-5, 0.999)[0] < 0.2
    assert one_run_scores_epsilon(noise + 6.0 * included, included, 1e-5, 0.999)[0] > 2.0


def test_one_run_power_grows_with_mu() -> None:
    powers = [one_run_power(mu, 1000, 1e-5, 0.999) for mu in (0.2, 0.5, 1.0, 5.0)]
    assert powers == sorted(powers)
    assert powers[-1] > 2.0
    # what is expected of correct code lies below its ε
    assert powers[1] < 2.0
