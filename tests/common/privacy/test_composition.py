"""ε by three accountants: known values, closed forms, monotone, PLD <= PRV <= PLD + 0.02 and PLD <= RDP."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from scipy.special import ndtr

from common.errors import ConfigError
from common.privacy.composition import (
    RDP_ORDERS,
    epsilon_from_rdp,
    epsilon_pld,
    epsilon_prv,
    epsilon_rdp,
    rdp_curve,
    rdp_of_sampled_gaussian,
)
from common.privacy.events import gaussian, sampled_gaussian

RATE_128 = 128 / 1613
CASES = [
    pytest.param([gaussian(3.186)], 1e-4, id="one-gaussian"),
    pytest.param([gaussian(1.391, count=3)], 1e-5, id="three-gaussians"),
    pytest.param([sampled_gaussian(2.11, RATE_128, count=50)], 1e-4, id="50-steps"),
    pytest.param([sampled_gaussian(14.69, RATE_128, count=3250)], 1e-4, id="3250-steps"),
    pytest.param([sampled_gaussian(7.42, 512 / 1613, count=50)], 1e-4, id="batch-512"),
    pytest.param([sampled_gaussian(0.8, 0.01, count=100)], 1e-5, id="little-noise"),
    pytest.param([gaussian(6.0), sampled_gaussian(2.4, RATE_128, count=50)], 1e-4, id="statistics-and-steps"),
    pytest.param([sampled_gaussian(3.0, 1.0, count=4), gaussian(5.0)], 1e-5, id="rate-one"),
]


def delta_of_gaussian(epsilon: float, sigma: float) -> float:
    """Balle and Wang 2018, theorem 5: exact δ of one Gaussian release with sensitivity 1."""
    upper = ndtr(0.5 / sigma - epsilon * sigma)
    return float(upper - math.exp(epsilon) * ndtr(-0.5 / sigma - epsilon * sigma))


@pytest.mark.parametrize(("events", "delta"), CASES)
def test_accountants_agree_in_their_order(events: list, delta: float) -> None:
    pld = epsilon_pld(events, delta)
    assert pld <= epsilon_prv(events, delta) <= pld + 0.02
    assert pld <= epsilon_rdp(events, delta) <= 1.5 * pld + 0.2
    assert pld <= epsilon_from_rdp(rdp_curve(events), delta)


def test_opacus_golden_values() -> None:
    # Opacus' own tests: σ 1.5, q 0.04, 90 epochs, δ 1e-5; its RDP test takes 2250 steps, its PRV test 2249.
    assert epsilon_rdp([sampled_gaussian(1.5, 0.04, count=2250)], 1e-5) == pytest.approx(7.32911, abs=5e-6)
    assert epsilon_prv([sampled_gaussian(1.5, 0.04, count=2249)], 1e-5) == pytest.approx(6.77740, abs=5e-6)
    assert epsilon_pld([sampled_gaussian(1.5, 0.04, count=2249)], 1e-5) == pytest.approx(6.768, abs=5e-3)


@pytest.mark.parametrize(
    ("sigma", "epsilon", "delta"),
    [(3.186, 1.0, 1e-4), (3.73, 1.0, 1e-5), (1.391, 3.0, 1e-5), (0.3, 25.0, 1e-6)],
)
def test_epsilon_pld_of_one_gaussian_is_the_closed_form_from_above(sigma: float, epsilon: float, delta: float) -> None:
    found = epsilon_pld([gaussian(sigma)], delta)
    assert delta_of_gaussian(found, sigma) <= delta  # pessimistic...
    assert delta_of_gaussian(found - 2e-4 * max(1.0, found), sigma) > delta  # ...and tight
    if sigma > 1.0:
        assert found == pytest.approx(epsilon, abs=1e-3)


@pytest.mark.parametrize("epsilon_of", [epsilon_pld, epsilon_prv, epsilon_rdp])
def test_known_noise_multipliers_of_the_sampled_gaussian_give_epsilon_one(epsilon_of) -> None:
    # The tabulated values lie where an upper bound 0.01-0.02 above PLD, such as PRV, reaches one.
    for sigma, rate, steps in [(2.11, RATE_128, 50), (14.69, RATE_128, 3250), (7.42, 512 / 1613, 50)]:
        found = epsilon_of([sampled_gaussian(sigma, rate, count=steps)], 1e-4)
        low, high = {epsilon_pld: (0.97, 1.0), epsilon_prv: (0.985, 1.0), epsilon_rdp: (1.0, 1.3)}[epsilon_of]
        assert low <= found <= high, (sigma, rate, steps)


def test_gaussian_releases_compose_as_one_with_less_noise() -> None:
    # μ² adds up exactly (Dong, Roth, Su 2022): 16 releases at σ = 8 are one at σ = 2.
    many, one = epsilon_pld([gaussian(8.0, count=16)], 1e-5), epsilon_pld([gaussian(2.0)], 1e-5)
    assert many == pytest.approx(one, rel=1e-3)
    assert epsilon_pld([gaussian(8.0, count=7), gaussian(8.0, count=9)], 1e-5) == many
    assert epsilon_pld([gaussian(3.0), gaussian(4.0)], 1e-5) == epsilon_pld([gaussian(2.4)], 1e-5)


def test_rate_one_is_the_plain_gaussian_for_every_accountant() -> None:
    for epsilon_of in (epsilon_pld, epsilon_prv, epsilon_rdp):
        plain, sampled = [gaussian(2.0, count=3)], [sampled_gaussian(2.0, 1.0, count=3)]
        assert epsilon_of(plain, 1e-5) == epsilon_of(sampled, 1e-5)
        assert math.isfinite(epsilon_of(sampled, 1e-5))


def test_epsilon_is_monotone_in_noise_rate_and_steps() -> None:
    def epsilons(cases: list[tuple[float, float, int]]) -> list[float]:
        return [epsilon_pld([sampled_gaussian(s, q, count=t)], 1e-5) for s, q, t in cases]

    for falling in (
        epsilons([(sigma, 0.05, 100) for sigma in (0.7, 1.0, 1.01, 1.5, 3.0, 10.0)]),
        epsilons([(1.5, rate, 100) for rate in (1.0, 0.5, 0.1, 0.099, 0.02, 0.001)]),
        epsilons([(1.5, 0.05, steps) for steps in (1000, 300, 299, 50, 2, 1)]),
    ):
        assert all(math.isfinite(value) and value > 0.0 for value in falling)
        assert falling == sorted(falling, reverse=True)
        assert len(set(falling)) == len(falling)


def test_adding_an_event_never_lowers_epsilon_and_order_does_not_matter() -> None:
    steps, release = sampled_gaussian(2.4, 0.08, count=50), gaussian(6.0)
    both = epsilon_pld([steps, release], 1e-4)
    assert both == epsilon_pld([release, steps], 1e-4)
    assert both > max(epsilon_pld([steps], 1e-4), epsilon_pld([release], 1e-4))


def test_no_events_cost_nothing_and_zero_noise_is_infinite() -> None:
    for epsilon_of in (epsilon_pld, epsilon_prv, epsilon_rdp):
        assert epsilon_of([], 1e-5) == 0.0
        assert epsilon_of([gaussian(5.0), sampled_gaussian(0.0, 0.01)], 1e-5) == math.inf
    assert set(rdp_curve([gaussian(0.0)]).values()) == {math.inf}


def test_tiny_noise_is_a_large_finite_bound_without_a_huge_grid() -> None:
    # One release at σ = 0.01 has a mean privacy loss of 5000; no accountant may say less.
    assert 5000.0 < epsilon_pld([gaussian(0.01)], 1e-5) < 20_000.0


@pytest.mark.parametrize("sigma", [5e-324, 1e-160, 1e-50, 1e-3, 1e9])
@pytest.mark.parametrize("rate", [5e-324, 1e-9, 1.0 - 1e-16, 1.0])
@pytest.mark.parametrize("count", [1, 10_000_000])
def test_extreme_events_have_an_epsilon_and_do_not_fail(sigma: float, rate: float, count: int) -> None:
    event = sampled_gaussian(sigma, rate, count=count)
    found = epsilon_pld([event, gaussian(50.0)], 1e-5)
    assert found > 0.01
    if sigma < 1e-20 and rate > 0.5:
        assert found > 1e30
    assert all(value > 0.0 for value in rdp_curve([event, gaussian(50.0)]).values())


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf, True, None])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    for function in (epsilon_pld, epsilon_prv, epsilon_rdp):
        with pytest.raises(ConfigError, match="delta"):
            function([gaussian(1.0)], delta)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 14.0])
@pytest.mark.parametrize("rate", [1e-4, 0.05, 0.9, 1.0])
def test_rdp_agrees_with_two_other_implementations(sigma: float, rate: float) -> None:
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    for order in (2, 3, 8, 64, 256):
        ours = rdp_of_sampled_gaussian(sigma, rate, order)
        opacus = float(compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=float(order)))
        # Theirs cancel near 1 + 1e-16, ours does not: allow for their absolute error.
        assert ours == pytest.approx(opacus, rel=1e-6, abs=1e-12)
    curve = rdp_curve([sampled_gaussian(sigma, rate, count=1000)])
    accountant = RdpAccountant(orders=list(RDP_ORDERS))
    accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), 1000)
    assert epsilon_from_rdp(curve, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6, abs=1e-9)


def test_rdp_of_order_two_is_its_closed_form() -> None:
    # E_Q[(P/Q)²] = 1 + q² (exp(1/σ²) - 1), also where it differs from 1 by less than a rounding error.
    for sigma, rate in [(1.0, 0.3), (2.5, 1e-3), (20.0, 1e-9)]:
        expected = math.log1p(rate**2 * math.expm1(1.0 / sigma**2))
        assert rdp_of_sampled_gaussian(sigma, rate, 2) == pytest.approx(expected, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("order", [1, 0, -3, 2.0, True])
def test_rdp_refuses_orders_that_are_not_integers_of_two_or_more(order: int) -> None:
    with pytest.raises(ConfigError, match="order"):
        rdp_of_sampled_gaussian(1.25, 0.5, order)


def test_importing_accounting_loads_no_heavy_library() -> None:
    code = (
        "import sys, common.privacy.calibration;"
        "print([m for m in ('torch', 'opacus', 'dp_accounting', 'scipy', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
