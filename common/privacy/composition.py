"""ε of a list of privacy events, by three accountants. Neighbouring relation throughout: add or remove one
unit.

The privacy loss distribution (PLD) is the figure we state: pessimistic, on a "connect the dots" grid.
Opacus' PRV and RDP accountants are independent code and serve as cross-checks: PLD <= PRV <= PLD + 0.02 and
PLD <= RDP. All three compose events that were *declared before the first of them was released*. Releases
chosen after seeing earlier ones go through `common.privacy.filter`.

The accounting libraries take seconds to import and most processes never need them: they are imported when
first used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from common.errors import ConfigError
from common.privacy.events import MechanismKey, PrivacyEvent, mechanism_counts

RDP_ORDERS: tuple[int, ...] = (
    *range(2, 65),
    *range(72, 257, 8),
    *range(288, 1025, 32),
    *range(1280, 4097, 256),
)

# Grid of the PLD: a power of two, at most 2^-10 of ε, and finer where single steps lose less than that.
_COARSEST_INTERVAL_EXPONENT = -10
_FINEST_INTERVAL_EXPONENT = -20
_STEPS_PER_LOSS_DEVIATION = 16.0
_MOST_GRID_POINTS = 300_000
# Below this noise multiplier a single release loses hundreds of ε; the Rényi bound says so without a huge
# grid.
_SMALLEST_PLD_NOISE_MULTIPLIER = 0.1
# Opacus warns where its orders end at 63; its bound is then loose, and still a bound.
_OPACUS_ORDERS_END = "Optimal order is the"
_LOWEST_RATE, _HIGHEST_RATE = 1e-9, 1.0 - 1e-9


def epsilon_pld(events: Iterable[PrivacyEvent], delta: float) -> float:
    """ε of the events together at δ, by pessimistic composition of privacy loss distributions.

    Args:
        events: everything that was released, declared in advance; any order.
        delta: δ in (0, 1).

    Returns:
        An upper bound on ε for adding or removing one unit; 0 for no events, infinity if any noise is zero.

    Raises:
        ConfigError: δ outside (0, 1).

    Source: Doroshenko et al. 2022 ("connect the dots"), as in Google's dp-accounting.
    """
    check_delta(delta)
    mechanisms = _for_loss_distributions(mechanism_counts(events))
    return _epsilon_pld(mechanisms, float(delta), _pld_interval(mechanisms))


def _for_loss_distributions(mechanisms: tuple[MechanismKey, ...]) -> tuple[MechanismKey, ...]:
    """The same or a worse loss in a form that is quick to compute and never at the edge of floating point.

    Plain Gaussians compose exactly into one: the inverse squares of their noise multipliers add up. Rates
    next to 0 or 1 are raised a little.
    """
    sampled = tuple(
        (sigma, max(rate, _LOWEST_RATE), count) for sigma, rate, count in mechanisms if rate <= _HIGHEST_RATE
    )
    plain = [(sigma, count) for sigma, rate, count in mechanisms if rate > _HIGHEST_RATE]
    if not plain:
        return sampled
    if plain[0][0] == 0.0:
        return ((0.0, 1.0, 1), *sampled)
    merged = math.fsum(count / sigma**2 for sigma, count in plain) ** -0.5
    return ((merged, 1.0, 1), *sampled)


@lru_cache(maxsize=4096)
def _epsilon_pld(mechanisms: tuple[MechanismKey, ...], delta: float, interval: float) -> float:
    if not mechanisms:
        return 0.0
    smallest = min(sigma for sigma, _, _ in mechanisms)
    if smallest == 0.0:
        return math.inf
    if smallest < _SMALLEST_PLD_NOISE_MULTIPLIER:
        return epsilon_from_rdp(_rdp_curve(mechanisms), delta)
    total: Any = None
    for sigma, rate, count in mechanisms:
        distribution = _loss_distribution(sigma, rate, count, interval)
        total = distribution if total is None else total.compose(distribution)
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=32)
def _loss_distribution(sigma: float, rate: float, count: int, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    single = privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=rate,
        pessimistic_estimate=True,
        use_connect_dots=True,
        value_discretization_interval=interval,
    )
    return single if count == 1 else single.self_compose(count)


def _pld_interval(mechanisms: Sequence[MechanismKey]) -> float:
    """Grid interval for these mechanisms: fine against one step's loss, coarse enough for seconds."""
    exponent = _COARSEST_INTERVAL_EXPONENT
    for sigma, rate, _ in mechanisms:
        if sigma >= _SMALLEST_PLD_NOISE_MULTIPLIER:
            deviation = rate * math.sqrt(math.expm1(min(1.0 / sigma**2, 600.0))) if rate < 1.0 else 1.0 / sigma
            wanted = math.floor(math.log2(max(deviation, 1e-30) / _STEPS_PER_LOSS_DEVIATION))
            exponent = min(exponent, max(wanted, _FINEST_INTERVAL_EXPONENT))
    for sigma, _, _ in mechanisms:
        if sigma >= _SMALLEST_PLD_NOISE_MULTIPLIER:
            widest_loss = 0.5 / sigma**2 + 10.0 / sigma
            exponent = max(exponent, math.ceil(math.log2(widest_loss / _MOST_GRID_POINTS)))
    return float(2.0**exponent)


def epsilon_prv(events: Iterable[PrivacyEvent], delta: float) -> float:
    """ε by Opacus' PRV accountant (upper bound, ε error 0.01): a cross-check, not the stated figure.

    Args and Raises as `epsilon_pld`.

    Source: Gopi, Lee, Wutschitz 2021; Opacus' implementation.
    """
    check_delta(delta)
    mechanisms = mechanism_counts(events)
    if not mechanisms:
        return 0.0
    if mechanisms[0][0] == 0.0:
        return math.inf
    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(mechanisms)
    # At rate 1 Opacus' formulas are those of the plain Gaussian, but take log(1 - q) on the way.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_OPACUS_ORDERS_END)
        return float(accountant.get_epsilon(delta))


def epsilon_rdp(events: Iterable[PrivacyEvent], delta: float) -> float:
    """ε by Opacus' RDP accountant: a cross-check, not the stated figure.

    Args and Raises as `epsilon_pld`.

    Source: Mironov, Talwar, Zhang 2019; Opacus' implementation.
    """
    check_delta(delta)
    mechanisms = mechanism_counts(events)
    if not mechanisms:
        return 0.0
    if mechanisms[0][0] == 0.0:
        return math.inf
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(mechanisms)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_OPACUS_ORDERS_END)
        return float(accountant.get_epsilon(delta))


def rdp_curve(events: Iterable[PrivacyEvent]) -> dict[int, float]:
    """Rényi divergence bound of all events together at each integer order in `RDP_ORDERS`.

    Args:
        events: what was released; any order.

    Returns:
        order -> RDP, for adding or removing one unit; infinity where any noise is zero.

    Source: Mironov 2017 (Gaussian); Mironov, Talwar, Zhang 2019, section 3.3 (sampled, integer orders).
    """
    return _rdp_curve(mechanism_counts(events))


def _rdp_curve(mechanisms: Sequence[MechanismKey]) -> dict[int, float]:
    return {order: rdp_at_order(mechanisms, order) for order in RDP_ORDERS}


def rdp_at_order(mechanisms: Sequence[MechanismKey], order: int) -> float:
    """Summed RDP of (noise_multiplier, sampling_rate, count) mechanisms at one integer order."""
    return math.fsum(count * rdp_of_sampled_gaussian(sigma, rate, order) for sigma, rate, count in mechanisms)


@lru_cache(maxsize=4096)
def rdp_of_sampled_gaussian(noise_multiplier: float, sampling_rate: float, order: int) -> float:
    """RDP of one Poisson-sampled Gaussian release at an integer order, for adding or removing one unit.

    Args:
        noise_multiplier: σ >= 0.
        sampling_rate: q in (0, 1]; 1 gives the plain Gaussian's order / (2 σ²).
        order: integer α >= 2.

    Returns:
        The Rényi divergence bound; infinity for σ = 0.

    Raises:
        ConfigError: the order is not an integer of at least 2.

    Source: Mironov, Talwar, Zhang 2019, eq. (6).
    Departs: Σ_k Binom(α,k) (1-q)^(α-k) q^k = 1 is subtracted term by term, which keeps the relative
        precision when the divergence is tiny; the terms k = 0 and 1 then vanish.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 2:
        raise ConfigError(f"Rényi order: expected an integer of at least 2, found {order!r}")
    sigma, q = noise_multiplier, sampling_rate
    if sigma == 0.0:
        return math.inf
    if q == 1.0:
        return order / (2.0 * sigma**2)
    import numpy as np

    k = np.arange(2, order + 1)
    log_factorial = _log_factorials(order)
    log_binomial = log_factorial[order] - log_factorial[k] - log_factorial[order - k]
    exponent = k * (k - 1) / (2.0 * sigma**2)
    log_expm1 = exponent + np.log(-np.expm1(-exponent))
    log_terms = log_binomial + k * math.log(q) + (order - k) * math.log1p(-q) + log_expm1
    peak = float(log_terms.max())
    log_excess = peak + math.log(float(np.exp(log_terms - peak).sum()))
    log_moment = math.log1p(math.exp(log_excess)) if log_excess < 30.0 else log_excess
    return log_moment / (order - 1)


@lru_cache(maxsize=256)
def _log_factorials(largest: int) -> Any:
    import numpy as np

    return np.array([math.lgamma(n + 1) for n in range(largest + 1)])


def epsilon_from_rdp(curve: dict[int, float], delta: float) -> float:
    """Smallest ε that any order of an RDP curve gives at δ.

    Source: Canonne, Kamath, Steinke 2020, proposition 12 (as in `rdp_to_epsilon`).
    """
    return min(rdp_to_epsilon(rdp, order, delta) for order, rdp in curve.items())


def rdp_to_epsilon(rdp: float, order: int, delta: float) -> float:
    """ε at δ of a mechanism with Rényi divergence `rdp` at `order`, at least 0.

    Source: Canonne, Kamath, Steinke 2020, proposition 12.
    """
    return max(0.0, rdp + epsilon_offset(order, delta))


def epsilon_offset(order: int, delta: float) -> float:
    """What the conversion at this order adds to the RDP: log(1 - 1/α) - log(δ α) / (α - 1)."""
    return math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1)


def check_delta(delta: float) -> None:
    """Refuse a δ outside (0, 1)."""
    if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0.0 < delta < 1.0:
        raise ConfigError(f"delta: expected a number in (0, 1), found {delta!r}")


def check_epsilon(epsilon: float) -> None:
    """Refuse an ε that is not a positive finite number."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0.0 < epsilon < math.inf:
        raise ConfigError(f"epsilon: expected a positive finite number, found {epsilon!r}")
