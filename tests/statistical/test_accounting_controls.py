"""The stated ε holds against simulation, and every broken way of accounting is caught.

`check_accountant` draws privacy losses of the real mechanism (Poisson-sampled Gaussian steps and a statistics
release) by Monte Carlo, both for adding and for removing one unit, and refuses an accountant whose ε is too
small or far too large for δ. It shares no code with any accountant. `check_filter` lets an adversary who
looks at the losses so far choose the later releases, and refuses a filter that lets the whole pass (ε, δ).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from common.privacy.calibration import calibrate_noise_multiplier
from common.privacy.composition import epsilon_pld, epsilon_prv, epsilon_rdp
from common.privacy.events import PrivacyEvent, gaussian, sampled_gaussian
from common.privacy.filter import filter_allows

DELTA = 0.01  # large, so that 200,000 draws see it to a few percent
DRAWS, ADVERSARY_DRAWS = 200_000, 30_000
RUN = (gaussian(4.0), sampled_gaussian(1.2, 0.1, count=40))
Accountant = Callable[[Sequence[PrivacyEvent], float], float]
Filter = Callable[[Sequence[PrivacyEvent], Sequence[PrivacyEvent], float, float], bool]


class AccountingError(Exception):
    """An accountant, a calibration or a filter does not hold what it states."""


def simulated_losses(events: Sequence[PrivacyEvent], *, remove: bool, seed: int) -> np.ndarray:
    """Privacy loss of all releases together, one draw a row, in the world with or without."""
    generator = np.random.default_rng(seed)
    total = np.zeros(DRAWS)
    for event in events:
        sigma, rate = event.noise_multiplier, event.sampling_rate
        for _ in range(event.count):
            taken = generator.random(DRAWS) < rate if remove else np.zeros(DRAWS, dtype=bool)
            release = taken + sigma * generator.standard_normal(DRAWS)
            # log of (density with the unit) / (density without it)
            ratio = np.log1p(rate * np.expm1((release - 0.5) / sigma**2))
            total += ratio if remove else -ratio
    return total


def simulated_delta(losses: np.ndarray, epsilon: float) -> tuple[float, float]:
    """Estimate of δ(ε) = E[(1 - exp(ε - L))+] and its standard error."""
    values = -np.expm1(np.minimum(0.0, epsilon - losses))
    return float(values.mean()), float(values.std() / math.sqrt(values.size))


def check_accountant(accountant: Accountant, slack: float = 1.1) -> None:
    """Refuse an accountant whose ε the simulation contradicts, or from which even ε / slack would hold."""
    epsilon = accountant(RUN, DELTA)
    losses = {remove: simulated_losses(RUN, remove=remove, seed=5) for remove in (True, False)}
    found = [simulated_delta(of_world, epsilon) for of_world in losses.values()]
    if any(delta - 5.0 * error > DELTA for delta, error in found):
        raise AccountingError(f"ε = {epsilon:.3f} is too small: δ is {max(found)[0]:.4f} and not {DELTA}")
    smaller = [simulated_delta(of_world, epsilon / slack) for of_world in losses.values()]
    if all(delta + 5.0 * error < DELTA for delta, error in smaller):
        raise AccountingError(f"ε = {epsilon:.3f} is needlessly large")


@pytest.mark.parametrize("accountant", [epsilon_pld, epsilon_prv])
def test_stated_epsilon_holds_in_simulation(accountant: Accountant) -> None:
    check_accountant(accountant)


def test_rdp_epsilon_holds_in_simulation_and_is_looser() -> None:
    check_accountant(epsilon_rdp, slack=1.6)


def _with(**changes: float) -> Accountant:
    """PLD of a run whose training steps are changed by factors."""

    def accountant(events: Sequence[PrivacyEvent], delta: float) -> float:
        release, steps = events
        changed = sampled_gaussian(
            steps.noise_multiplier * changes.get("noise", 1.0),
            min(1.0, steps.sampling_rate * changes.get("rate", 1.0)),
            count=round(steps.count * changes.get("steps", 1.0)),
        )
        return epsilon_pld([release, changed], delta)

    return accountant


BROKEN_ACCOUNTANTS: dict[str, Accountant] = {
    "reset at every step": lambda events, delta: max(
        epsilon_pld([gaussian(e.noise_multiplier)], delta)
        if e.sampling_rate == 1.0
        else epsilon_pld([sampled_gaussian(e.noise_multiplier, e.sampling_rate)], delta)
        for e in events
    ),
    "statistics not charged": lambda events, delta: epsilon_pld(events[1:], delta),
    "steps not charged": lambda events, delta: epsilon_pld(events[:1], delta),
    "half of the steps": _with(steps=0.5),
    "noise taken for twice what it is": _with(noise=2.0),
    "sampled at half the rate": _with(rate=0.5),
    "sampling forgotten": _with(rate=10.0),
}


@pytest.mark.parametrize("name", BROKEN_ACCOUNTANTS)
def test_simulation_rejects_broken_accountant(name: str) -> None:
    with pytest.raises(AccountingError):
        check_accountant(BROKEN_ACCOUNTANTS[name])


BUDGETS = [(1.0, 1e-4, 0.08, 50), (0.5, 1e-5, 1.0, 1), (3.0, 1e-5, 0.02, 200), (8.0, 1e-6, 0.3, 10)]


def check_calibration(calibrate: Callable[[float, float, float, int], float]) -> None:
    """Refuse a calibration that overshoots ε, or wastes more than 1 % of it."""
    for epsilon, delta, rate, steps in BUDGETS:
        sigma = calibrate(epsilon, delta, rate, steps)
        found = epsilon_pld([sampled_gaussian(sigma, rate, count=steps)], delta)
        if not 0.99 * epsilon <= found <= epsilon:
            raise AccountingError(f"calibrated for ε = {epsilon}, found {found:.4f}")


def test_calibration_uses_epsilon_and_never_more() -> None:
    check_calibration(calibrate_noise_multiplier)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda e, d, q, t: round(calibrate_noise_multiplier(e, d, q, t), 1) - 0.1, id="rounded-down"),
        pytest.param(lambda e, d, q, t: calibrate_noise_multiplier(e, d, q, max(1, t // 2)), id="fewer-steps"),
        pytest.param(lambda e, d, q, t: calibrate_noise_multiplier(e, d, q / 2, t), id="half-the-rate"),
        pytest.param(lambda e, d, q, t: calibrate_noise_multiplier(e, 10 * d, q, t), id="larger-delta"),
        pytest.param(lambda e, d, q, t: calibrate_noise_multiplier(e, d, 1.0, t), id="sampling-forgotten"),
    ],
)
def test_calibration_check_rejects_broken(broken: Callable[[float, float, float, int], float]) -> None:
    with pytest.raises(AccountingError):
        check_calibration(broken)


def check_filter(allows: Filter, epsilon: float = 1.0) -> None:
    """Refuse a filter under which an adversary who sees the losses passes (ε, δ).

    Runs of σ = 12 until the filter refuses; after each, whoever is behind half of ε asks for one big release
    (σ = 4) instead, again until the filter refuses. At most 150 releases.
    """
    small, big = gaussian(12.0), gaussian(4.0)
    generator = np.random.default_rng(3)
    losses, spent = np.zeros(ADVERSARY_DRAWS), np.zeros((ADVERSARY_DRAWS, 2), dtype=int)
    running = np.ones(ADVERSARY_DRAWS, dtype=bool)
    answers: dict[tuple[int, int, bool], bool] = {}

    def allowed(counts: tuple[int, int], take_big: bool) -> bool:
        key = (*counts, take_big)
        if key not in answers:
            before = [event for event, count in zip((small, big), counts, strict=True) for _ in range(count)]
            answers[key] = allows(before, [big if take_big else small], epsilon, DELTA)
        return answers[key]

    for _ in range(150):
        take_big = losses < 0.5 * epsilon * spent[:, 0] / 40.0
        for row in np.unique(np.column_stack([spent, take_big])[running], axis=0):
            if not allowed((int(row[0]), int(row[1])), bool(row[2])):
                running &= ~((spent == row[:2]).all(axis=1) & (take_big == bool(row[2])))
        if not running.any():
            break
        sigma = np.where(take_big, big.noise_multiplier, small.noise_multiplier)
        step = 0.5 / sigma**2 + generator.standard_normal(ADVERSARY_DRAWS) / sigma
        losses[running] += step[running]
        spent[running, take_big[running].astype(int)] += 1
    delta, error = simulated_delta(losses, epsilon)
    if delta - 5.0 * error > DELTA:
        raise AccountingError(f"the filter let δ grow to {delta:.4f}, not {DELTA}, at ε = {epsilon}")
    if spent.sum(axis=1).max() < 2:
        raise AccountingError("the filter lets nothing through")


def test_filter_holds_against_an_adversary_who_looks() -> None:
    check_filter(filter_allows)


BROKEN_FILTERS: dict[str, Filter] = {
    "forgets earlier runs": lambda spent, new, epsilon, delta: (
        len(spent) < 60 and filter_allows([], new, epsilon, delta)
    ),
    "looks at the last run only": lambda spent, new, epsilon, delta: (
        len(spent) < 60 and filter_allows(spent[-1:], new, epsilon, delta)
    ),
    "counts a third": lambda spent, new, epsilon, delta: filter_allows(spent[::3], new, epsilon, delta),
    "lets nothing through": lambda spent, new, epsilon, delta: False,
}


@pytest.mark.parametrize("name", BROKEN_FILTERS)
def test_filter_check_rejects_broken(name: str) -> None:
    with pytest.raises(AccountingError):
        check_filter(BROKEN_FILTERS[name])
