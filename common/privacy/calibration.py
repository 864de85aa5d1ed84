"""Noise multipliers from a privacy budget.

Calibration never overshoots: a noise multiplier is rounded up, and its ε is checked with the accountant that
states it. Neighbouring relation throughout: add or remove one unit. Events: `common.privacy.events`; composition:
`common.privacy.composition`; composition across runs: `common.privacy.filter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache

from common.errors import ConfigError
from common.privacy.composition import check_delta, check_epsilon, epsilon_pld
from common.privacy.events import PrivacyEvent, gaussian, mechanism_counts, sampled_gaussian

LARGEST_NOISE_MULTIPLIER = 1e6
SMALLEST_NOISE_MULTIPLIER = 0.1
_TIGHTNESS = 2e-3
_SIGNIFICANT_DIGITS = 5
_MOST_EVALUATIONS = 60


def calibrate_noise_multiplier(
    epsilon: float,
    delta: float,
    sampling_rate: float,
    num_steps: int,
    extra_events: Sequence[PrivacyEvent] = (),
) -> float:
    """Noise multiplier with which all steps and the extra events use ε up to 0.2 %, and never more than ε.

    Args:
        epsilon: ε of everything together, positive.
        delta: δ in (0, 1).
        sampling_rate: Poisson rate q in (0, 1]; 1 is the plain Gaussian.
        num_steps: number of sampled releases T >= 1.
        extra_events: other declared releases of the same run, such as the statistics.

    Returns:
        σ >= 0.1 with `epsilon_pld([*extra_events, T steps], delta) <= epsilon`, for adding or removing one
        unit.

    Raises:
        ConfigError: a value out of range, extra events that leave nothing of ε, or no such σ up to 10^6.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    sampled_gaussian(1.0, sampling_rate, count=num_steps)  # refuses a rate or a count out of range
    return _calibrate(float(epsilon), float(delta), float(sampling_rate), num_steps, tuple(extra_events))


@lru_cache(maxsize=256)
def _calibrate(
    epsilon: float, delta: float, sampling_rate: float, num_steps: int, extra_events: tuple[PrivacyEvent, ...]
) -> float:
    spent = epsilon_pld(extra_events, delta)
    if spent >= epsilon:
        raise ConfigError(
            f"calibration: the extra events alone have ε = {spent:.6g} of {epsilon:.6g} at δ = {delta:.3g}; "
            "raise ε, or give them more noise"
        )

    def epsilon_of(sigma: float) -> float:
        return epsilon_pld([*extra_events, sampled_gaussian(sigma, sampling_rate, count=num_steps)], delta)

    # `low` is too little noise, `high` is enough; only values that were evaluated are ever returned.
    low, high = SMALLEST_NOISE_MULTIPLIER, math.inf
    known: dict[float, float] = {}
    sigma = round_up(_central_limit_guess(epsilon, delta, sampling_rate, num_steps, extra_events))
    for _ in range(_MOST_EVALUATIONS):
        known[sigma] = epsilon_of(sigma)
        if known[sigma] <= epsilon:
            high = min(high, sigma)
            if known[sigma] >= epsilon * (1.0 - _TIGHTNESS) or sigma <= SMALLEST_NOISE_MULTIPLIER:
                return sigma
        else:
            low = max(low, sigma)
        if high < math.inf and round_up(low * (1.0 + 1e-4)) >= high:
            return high
        sigma = _next_noise_multiplier(known, epsilon, low, high)
        if sigma > LARGEST_NOISE_MULTIPLIER:
            break
    if high < math.inf:
        return high
    raise ConfigError(
        f"calibration: no noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g} keeps {num_steps} steps at "
        f"rate {sampling_rate:g} within ε = {epsilon:g} at δ = {delta:g}; ask for fewer steps or a larger ε"
    )


def _next_noise_multiplier(known: dict[float, float], epsilon: float, low: float, high: float) -> float:
    """Secant step of log ε over log σ through the two best points, else the middle of the bracket."""
    target = math.log(epsilon * (1.0 - _TIGHTNESS / 2.0))
    usable = [(math.log(sigma), math.log(value)) for sigma, value in known.items() if 0.0 < value < math.inf]
    usable.sort(key=lambda point: abs(point[1] - target))
    middle = math.sqrt(low * high) if high < math.inf else 2.0 * low
    if not usable:
        return round_up(max(middle, 2.0 * max(known)) if high == math.inf else middle)
    slope = -1.0
    if len(usable) > 1:
        rise, run = usable[1][1] - usable[0][1], usable[1][0] - usable[0][0]
        slope = rise / run if rise * run < 0.0 else -1.0
    step = (target - usable[0][1]) / slope
    proposal = math.exp(usable[0][0] + max(-3.0, min(3.0, step)))
    if len(known) > 8 or not low < proposal < high:
        # At the lower end of the range the answer may be the end itself.
        proposal = SMALLEST_NOISE_MULTIPLIER if proposal <= low and low not in known else middle
    proposal = round_up(proposal)
    return proposal if proposal not in known else round_up(middle)


def split_budget(
    epsilon: float, delta: float, sampling_rate: float, num_steps: int, statistics_share: float
) -> tuple[float | None, float]:
    """Divide one budget between a one-shot statistics release and T sampled training steps.

    The share is of μ², the quantity that adds up under Gaussian differential privacy: the statistics alone
    get `statistics_share` of the μ² of (ε, δ), and training gets what the loss distribution says is left.

    Args:
        epsilon: ε of everything together, positive.
        delta: δ in (0, 1).
        sampling_rate: Poisson rate q of the training steps in (0, 1].
        num_steps: number of training steps T >= 1.
        statistics_share: in [0, 1); 0 is no statistics release at all.

    Returns:
        (noise multiplier of the statistics, or None for share 0; noise multiplier of the training steps).
        Their ε together, for adding or removing one unit, is at most ε and at most 1 % below it.

    Raises:
        ConfigError: a value out of range.

    Source: Dong, Roth, Su 2022 (μ² adds up), Balle and Wang 2018 (μ of a budget).
    """
    if isinstance(statistics_share, bool) or not isinstance(statistics_share, (int, float)):
        raise ConfigError(f"statistics_share: expected a number in [0, 1), found {statistics_share!r}")
    if not 0.0 <= statistics_share < 1.0:
        raise ConfigError(f"statistics_share: expected a number in [0, 1), found {statistics_share}")
    if statistics_share == 0.0:
        return None, calibrate_noise_multiplier(epsilon, delta, sampling_rate, num_steps)
    mu = gaussian_dp_parameter(epsilon, delta)
    statistics = round_up(1.0 / (mu * math.sqrt(statistics_share)))
    return statistics, calibrate_noise_multiplier(epsilon, delta, sampling_rate, num_steps, (gaussian(statistics),))


def gaussian_dp_parameter(epsilon: float, delta: float) -> float:
    """The μ for which μ-Gaussian differential privacy is exactly (ε, δ); 1/μ is one release's noise
    multiplier.

    Args:
        epsilon: positive.
        delta: in (0, 1).

    Returns:
        μ > 0, for adding or removing one unit, rounded down in the last bits.

    Raises:
        ConfigError: a value out of range.

    Source: Balle and Wang 2018, theorem 8; Dong, Roth, Su 2022, corollary 1.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    from scipy.special import log_ndtr

    def delta_of(mu: float) -> float:
        upper = math.exp(log_ndtr(mu / 2.0 - epsilon / mu))
        return upper - math.exp(epsilon + log_ndtr(-mu / 2.0 - epsilon / mu))

    low, high = 1e-12, 1.0
    while delta_of(high) < delta:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if delta_of(middle) < delta else (low, middle)
    return low


def _central_limit_guess(
    epsilon: float, delta: float, sampling_rate: float, num_steps: int, extra_events: Sequence[PrivacyEvent]
) -> float:
    """Where to start the search: the central limit of the sampled Gaussian (Bu, Dong, Long, Su 2020)."""

    def squared_mu(sigma: float, rate: float, count: int) -> float:
        return count / sigma**2 if rate == 1.0 else count * rate**2 * math.expm1(min(700.0, sigma**-2))

    total = gaussian_dp_parameter(epsilon, delta) ** 2
    used = math.fsum(squared_mu(*mechanism) for mechanism in mechanism_counts(extra_events))
    each = max(total - used, 1e-3 * total) / num_steps
    guess = each**-0.5 if sampling_rate == 1.0 else math.log1p(each / sampling_rate**2) ** -0.5
    return min(max(guess, SMALLEST_NOISE_MULTIPLIER), LARGEST_NOISE_MULTIPLIER)


def round_up(value: float) -> float:
    """The next number of five significant decimal digits at or above a positive value."""
    digits = _SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(value))
    return float(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))
