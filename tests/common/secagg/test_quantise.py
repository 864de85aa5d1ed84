"""Integers, their sensitivity, their noise: the law of the sum is the one that is accounted for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from common.config.privacy import PrivacyConfig
from common.errors import ConfigError, DataError
from common.privacy.composition import epsilon_pld
from common.privacy.events import gaussian
from common.privacy.noise import SecureNoise, TestNoise
from common.secagg.assumptions import Assumptions
from common.secagg.quantise import (
    ROUNDING_MARGIN,
    Quantisation,
    add_up,
    decode,
    encode,
    make_quantisation,
    pack,
    rounded_gaussian,
    unpack,
)

TEN = Assumptions(10, 1, 1)
SHAPES = {"weight": (30, 40), "bias": (7,)}
Shares = Callable[[int, int, float], list[NDArray[np.float64]]]


def arguments(sigma: float = 5.0, sensitivity: float = 0.03, units: float = 1000.0) -> Quantisation:
    return make_quantisation(SHAPES, sensitivity, units, sigma, TEN)


class _NoNoise:
    """Rounding alone."""

    name, certified = "test", False

    def __init__(self, seed: int) -> None:
        self._draws = TestNoise(seed)

    def gaussian(self, shape: int | tuple[int, ...], std: float) -> NDArray[np.float64]:
        return np.zeros(shape)

    def uniform(self, size: int) -> NDArray[np.float64]:
        return self._draws.uniform(size)

    def exact_gaussian(self, values: NDArray[np.float64], std: float) -> NDArray[np.float64]:
        return values


def test_pack_and_unpack_are_inverse() -> None:
    values = np.random.default_rng(1).integers(2**40, size=1000).astype(np.uint64)
    content = pack(values, 40)
    assert len(content) == 5000
    np.testing.assert_array_equal(unpack(content, 40), values)
    with pytest.raises(DataError):
        unpack(content[:-1], 40)


def test_sum_of_sites_comes_back_with_the_noise_declared() -> None:
    made, source = arguments(), TestNoise(3)
    rng = np.random.default_rng(5)
    tensors = [
        {name: torch.from_numpy(rng.normal(size=shape, scale=0.4)) for name, shape in SHAPES.items()} for _ in range(10)
    ]
    total = decode(made, add_up([encode(made, one, source) for one in tensors], made.bits))
    for name in SHAPES:
        error = (total[name].double() - torch.stack([one[name] for one in tensors]).sum(0)).numpy()
        # all ten sent: ten shares of one eighth
        assert error.std() == pytest.approx(5.0 * 0.03 * math.sqrt(10 / 8), rel=0.1 if error.size > 100 else 0.7)


def test_decode_divides_and_keeps_signs() -> None:
    made = arguments()
    vector = np.zeros(made.size, dtype=np.uint64)
    vector[0], vector[1] = np.uint64(3), np.uint64(2**made.bits - 4)
    found = decode(made, vector, scale=2.0)["bias"]
    assert found[:3].tolist() == [1.5 * made.grid, -2.0 * made.grid, 0.0]


def test_rounding_has_no_bias() -> None:
    made = replace(arguments(), shapes={"x": (200_000,)})
    values = torch.full((200_000,), 0.3 * made.grid, dtype=torch.float64)
    found = encode(made, {"x": values}, _NoNoise(4)).astype(np.float64)
    assert set(np.unique(found)) == {0.0, 1.0}
    assert abs(found.mean() - 0.3) < 5 * math.sqrt(0.21 / 200_000)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.floats(-12, 3), st.floats(0, 1))
def test_sensitivity_after_rounding_keeps_the_margin(seed: int, power: float, share: float) -> None:
    """Two sums that differ by one unit of norm S, with the same random numbers: S / grid and the margin, never more."""
    made = arguments(units=10.0**power + 1.0)
    rng = np.random.default_rng(seed)
    base = rng.normal(size=made.size) * 10.0**power
    move = rng.normal(size=made.size) * (rng.random(made.size) < max(share, 0.01))
    move *= made.sensitivity / max(float(np.linalg.norm(move)), 1e-12)

    def integers(values: NDArray[np.float64]) -> NDArray[np.int64]:
        cut = {"bias": torch.from_numpy(values[:7]), "weight": torch.from_numpy(values[7:].reshape(30, 40))}
        shift = np.uint64(64 - made.bits)
        return (encode(made, cut, _NoNoise(seed)) << shift).view(np.int64) >> np.int64(shift)

    difference = integers(base + move) - integers(base)
    assert np.linalg.norm(difference.astype(float)) <= made.sensitivity / made.grid * (1 + ROUNDING_MARGIN)


@given(
    size=st.integers(1, 2_000_000),
    sensitivity=st.floats(1e-6, 1e6),
    sigma=st.floats(0.5, 100.0),
    sites=st.sampled_from([(4, 1, 1), (10, 1, 1), (3, 0, 1), (50, 5, 5)]),
)
def test_noise_pays_for_what_rounding_adds(
    size: int, sensitivity: float, sigma: float, sites: tuple[int, int, int]
) -> None:
    """The honest sites' shares have sigma times the widest difference of two rounded sums: S and sqrt(D) steps."""
    assumed = Assumptions(*sites)
    made = make_quantisation({"x": (size,)}, sensitivity, 1.0, sigma, assumed)
    together = made.share_std * math.sqrt(assumed.honest_shares)
    widest = sensitivity / made.grid + math.sqrt(size)
    assert together >= sigma * widest * (1 - 1e-12)


def test_coordinates_beyond_the_limit_are_cut() -> None:
    made = arguments(units=10.0)
    tensors = {"weight": torch.full((30, 40), 1e9), "bias": torch.full((7,), -1e9)}
    found = decode(made, encode(made, tensors, _NoNoise(1)))
    assert float(found["weight"].max()) == pytest.approx(made.limit * made.grid) == pytest.approx(0.3, rel=1e-3)
    assert float(found["bias"].min()) == pytest.approx(-0.3, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    tensors = {"weight": torch.full((30, 40), value), "bias": torch.zeros(7)}
    with pytest.raises(DataError, match="finite"):
        encode(arguments(), tensors, TestNoise(1))
    with pytest.raises(DataError, match="agreed"):
        encode(arguments(), {"weight": torch.zeros(30, 40)}, TestNoise(1))


def test_arguments_out_of_range_are_refused() -> None:
    for sensitivity, units, sigma in ((0.0, 1.0, 1.0), (1.0, math.nan, 1.0), (1.0, 1.0, 0.0), (math.inf, 1.0, 1.0)):
        with pytest.raises(ConfigError):
            make_quantisation(SHAPES, sensitivity, units, sigma, TEN)
    with pytest.raises(ConfigError, match="bits"):
        make_quantisation(SHAPES, 1.0, 1e12, 1.0, TEN)
    with pytest.raises(ConfigError, match="too little noise"):
        make_quantisation({"x": (1,)}, 1.0, 1.0, 1e-3, TEN)
    with pytest.raises(ConfigError, match="nothing to sum"):
        make_quantisation({}, 1.0, 1.0, 1.0, TEN)


@pytest.mark.parametrize("sites", [10, 50, 100, 200])
def test_wrapping_and_aliasing_are_negligible(sites: int) -> None:
    made = make_quantisation({"x": (100_000,)}, 0.03, 2.5e4, 45.0, PrivacyConfig().assumptions(sites))
    assert made.wrap_probability < 1e-26
    assert made.aliasing_bound < 1e-100
    assert made.bits in (40, 48)


# The law of the noise.


def honest_shares(count: int, size: int, std: float) -> list[NDArray[np.float64]]:
    source = SecureNoise()
    return [rounded_gaussian(source, size, std) for _ in range(count)]


def check_law(count: int, std: float, shares: Shares, size: int = 1_000_000) -> float:
    """p-value of chi-square of the sum of `count` shares against round(N(0, count std²) + count - 1 uniforms)."""
    total = np.sum(shares(count, size, std), axis=0)
    normal = stats.norm.ppf(np.arange(1, 200) / 200)
    edges = np.unique(np.rint(normal * math.sqrt(count * std**2 + (count - 1) / 12))) + 0.5
    expected = _rounded_law(count, std, edges)
    found = np.diff(np.concatenate([[0], np.searchsorted(np.sort(total), edges), [size]]))
    return float(stats.chisquare(found, expected * size).pvalue)


def _rounded_law(count: int, std: float, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability between edges (halves of odd numbers) of N(0, count std²) + (count - 1) uniforms, by quadrature."""
    offsets, weights = np.zeros(1), np.ones(1)
    nodes, factors = np.polynomial.legendre.leggauss(5)
    for _ in range(count - 1):
        offsets = (offsets[:, None] + nodes / 2).ravel()
        weights = (weights[:, None] * factors / 2).ravel()
        places, inverse = np.unique(np.round(offsets, 9), return_inverse=True)
        offsets, weights = places, np.bincount(inverse, weights)
    cumulative = np.array([weights @ stats.norm.cdf((edge - offsets) / (std * math.sqrt(count))) for edge in edges])
    return np.diff(np.concatenate([[0.0], cumulative, [1.0]]))


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("std", [8.0, 2.0**21])
def test_noise_of_the_sum_has_the_law_accounted_for(missing: int, std: float) -> None:
    """Ten sites, none, one and (with d = 1) d of them missing; at the coarsest grid allowed and at a usual one."""
    assert check_law(10 - missing, std, honest_shares) > 1e-6


def test_noise_of_the_sum_with_d_dropouts_of_twenty() -> None:
    assert check_law(Assumptions(20, 2, 2).threshold, 8.0, honest_shares) > 1e-6


BROKEN: dict[str, Shares] = {
    "a share for m sites": lambda n, size, std: honest_shares(n, size, std * math.sqrt(8 / 10)),
    "a share a hundredth too small": lambda n, size, std: honest_shares(n, size, std * 0.99),
    "one site adds none": lambda n, size, std: honest_shares(n - 1, size, std),
    "all add the same": lambda n, size, std: honest_shares(1, size, std) * n,
    "uniform": lambda n, size, std: [(SecureNoise().uniform(size) - 0.5) * std * math.sqrt(12) for _ in range(2)] * 2,
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_share_is_caught(name: str) -> None:
    # a hundredth shows in two million draws but for one run in 10¹³, in one million but for one in three hundred
    size = 2_000_000 if name == "a share a hundredth too small" else 1_000_000
    assert check_law(9, 2.0**21, BROKEN[name], size) < 1e-6


def _rounded_pmf(std: float, reach: int) -> NDArray[np.float64]:
    edges = (np.arange(-reach, reach + 2) - 0.5) / std
    return np.diff(stats.norm.cdf(edges))


def test_sum_of_rounded_normals_is_one_rounded_normal_with_uniforms() -> None:
    """The theorem of the module, by convolution: 4 shares of std 3, where aliasing is still exp(-44)."""
    count, std, reach = 4, 3.0, 60
    law = np.ones(1)
    for _ in range(count):
        law = np.convolve(law, _rounded_pmf(std, reach))
    integers = np.arange(len(law)) - len(law) // 2
    edges = np.concatenate([integers - 0.5, [integers[-1] + 0.5]])
    predicted = _rounded_law(count, std, edges)[1:-1]
    np.testing.assert_allclose(law, predicted, atol=3e-12)


def test_epsilon_of_the_exact_sum_is_at_most_the_gaussian_one() -> None:
    """Independent of dp-accounting's Gaussian: hockey-stick of the convolved integer law, at every ε of a grid."""
    count, std, shift = 8, 8.0, 45  # multiplier 8 sqrt(8) / 45 = 0.503
    law = np.ones(1)
    for _ in range(count):
        law = np.convolve(law, _rounded_pmf(std, 90))
    moved = np.roll(np.pad(law, shift), shift)
    still = np.pad(law, shift)
    multiplier = std * math.sqrt(count) / shift
    for epsilon in np.linspace(0.0, 8.0, 33):
        exact = np.maximum(moved - math.exp(epsilon) * still, 0.0).sum()
        mu = 1.0 / multiplier
        upper = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        assert exact <= upper + 1e-12
        assert exact >= 0.9 * upper - 1e-9  # and not much less: the bound is the mechanism's own


@pytest.mark.parametrize("steps", [1, 20])
def test_epsilon_composes_like_the_event_that_is_charged(steps: int) -> None:
    """A loss distribution of the integer law itself, composed by dp-accounting, against the event charged."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    count, std, shift = 8, 8.0, 5
    law = np.ones(1)
    for _ in range(count):
        law = np.convolve(law, _rounded_pmf(std, 40))
    still = {index: float(p) for index, p in enumerate(law) if p > 1e-20}
    moved = {index + shift: float(p) for index, p in enumerate(law) if p > 1e-20}
    exact = pld.from_two_probability_mass_functions(
        {key: math.log(p) for key, p in still.items()},
        {key: math.log(p) for key, p in moved.items()},
        value_discretization_interval=1e-4,
    ).self_compose(steps)
    charged = epsilon_pld([gaussian(std * math.sqrt(count) / shift, count=steps)], 1e-5)
    found = exact.get_epsilon_for_delta(1e-5)
    assert found <= charged * 1.01
    assert found >= charged * 0.97


def test_skellam_of_the_same_variance_has_no_smaller_epsilon() -> None:
    """The other noise that the literature offers, by its own Renyi bound (Agarwal et al. 2021): no gain."""
    made = arguments(sigma=5.0)
    steps = made.sensitivity / made.grid * (1 + ROUNDING_MARGIN)
    variance = (5.0 * steps) ** 2
    first = math.sqrt(made.size) * steps
    best = math.inf
    for order in range(2, 256):
        extra = min(((2 * order - 1) * steps**2 + 6 * first) / (4 * variance**2), 3 * first / (2 * variance))
        renyi = order * steps**2 / (2 * variance) + extra
        best = min(best, renyi + math.log1p(-1 / order) - math.log(1e-5 * order) / (order - 1))
    ours = epsilon_pld([gaussian(5.0)], 1e-5)
    assert ours <= best <= 1.3 * ours
