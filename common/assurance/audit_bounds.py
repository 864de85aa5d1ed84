"""Lower bounds on ε from attacks that were tried: what an audit may conclude, and with which power.

Two kinds. Two worlds: the same step with and without one unit, thousands of draws of each. One run: a thousand
canaries, each in or out by a coin, and guesses of which were in. Neighbouring relation: add or remove one unit.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from common.errors import ConfigError

FloatArray = NDArray[np.float64]
LARGEST_MU = 30.0


def proportion_bounds(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bounds of a probability, each at `confidence` (Clopper & Pearson 1934)."""
    error = 1.0 - confidence
    lower = 0.0 if successes == 0 else float(stats.beta.ppf(error, successes, trials - successes + 1))
    upper = 1.0 if successes == trials else float(stats.beta.isf(error, successes + 1, trials - successes))
    return lower, upper


def two_world_mu(without: FloatArray, with_unit: FloatArray, sampling_rate: float, confidence: float) -> float:
    """Lower bound of μ = 1 / σ of one sampled Gaussian step, from scores of draws in two worlds.

    The first fifth of the draws chooses the threshold, by bounds smoothed over neighbours, or where so few draws give
    no bound at all by the largest gap between the two worlds' rates; the rest is judged by it.

    Args:
        without: (n,) scores of the release in the world without the unit.
        with_unit: (n,) scores in the world with it; larger where the unit is in.
        sampling_rate: q in (0, 1].
        confidence: of the bound, both error rates together.

    Returns:
        μ >= 0, at most 30. For a mechanism that is a sampled Gaussian, 1/μ is an upper bound of its noise multiplier.

    Raises:
        ConfigError: fewer than 50 draws.

    Source: Nasr et al. (2023), "Tight auditing": bounds within the family of trade-off functions. For the sampled
        Gaussian, the test that rejects above a threshold has power (1 - q) α + q Φ(Φ⁻¹(α) + μ) at level α, so that the
        bound has a closed form.
    """
    count = min(len(without), len(with_unit))
    if count < 50:
        raise ConfigError(f"an audit needs at least 50 draws of each world, found {count}")
    pilot = count // 5
    share = 1.0 - (1.0 - confidence) / 2.0
    candidates = np.quantile(np.concatenate([without[:pilot], with_unit[:pilot]]), np.linspace(0.02, 0.98, 49))

    def mu_at(threshold: float, zero: FloatArray, one: FloatArray) -> float:
        _, false_rate = proportion_bounds(int((zero > threshold).sum()), len(zero), share)
        true_rate, _ = proportion_bounds(int((one > threshold).sum()), len(one), share)
        return _mu_of_rates(true_rate, false_rate, sampling_rate)

    seen = np.array([mu_at(float(value), without[:pilot], with_unit[:pilot]) for value in candidates])
    if not seen.any():
        seen = np.array([(with_unit[:pilot] > value).mean() - (without[:pilot] > value).mean() for value in candidates])
    # smoothed, since the largest of many noisy bounds is often a lucky threshold far out in a tail
    kernel = np.ones(13)
    smooth = np.convolve(seen, kernel, "same") / np.convolve(np.ones_like(seen), kernel, "same")
    return mu_at(float(candidates[smooth.argmax()]), without[pilot:], with_unit[pilot:])


def _mu_of_rates(true_rate: float, false_rate: float, sampling_rate: float) -> float:
    if not 0.0 < false_rate < 1.0:
        return 0.0
    among_drawn = (true_rate - (1.0 - sampling_rate) * false_rate) / sampling_rate
    if among_drawn <= false_rate:
        return 0.0
    gap = stats.norm.ppf(min(among_drawn, 1.0)) - stats.norm.ppf(false_rate)
    return float(min(gap, LARGEST_MU))


def two_world_power(noise_multiplier: float, sampling_rate: float, draws: int, confidence: float) -> float:
    """The largest factor f <= 1 for which noise of f σ is expected to be caught by `two_world_mu` on `draws` draws.

    Args:
        noise_multiplier: σ that is claimed.
        sampling_rate: q.
        draws: of each world.
        confidence: of the bound.

    Returns:
        f in [0, 1): noise above f times the claimed noise goes unseen. 0 where nothing would be seen.
    """
    judged = draws - draws // 5
    share = 1.0 - (1.0 - confidence) / 2.0

    def caught(factor: float) -> bool:
        mu = 1.0 / (factor * noise_multiplier)
        for threshold in np.linspace(-0.5, mu + 2.5, 25):
            level = stats.norm.sf(threshold)
            power = (1.0 - sampling_rate) * level + sampling_rate * stats.norm.sf(threshold - mu)
            _, false_rate = proportion_bounds(round(judged * level), judged, share)
            true_rate, _ = proportion_bounds(round(judged * power), judged, share)
            if _mu_of_rates(true_rate, false_rate, sampling_rate) * noise_multiplier > 1.0:
                return True
        return False

    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if caught(middle) else (low, middle)
    return low


def one_run_pvalue(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Probability bound of so many correct guesses if the run were (ε, δ)-private.

    Args:
        correct: guesses that were right.
        guesses: guesses that were made; the other canaries were passed over.
        canaries: m, each included by a fair coin.
        epsilon: hypothesis, for adding or removing one unit.
        delta: hypothesis.

    Returns:
        An upper bound of P[correct or more], at most 1.

    Source: Steinke, Nasr, Jagielski (2023), theorem 5.2: W is dominated by a binomial with success probability
        e^ε / (1 + e^ε), up to δ terms: P[W >= v] <= β + 2 m δ max_i (P[v - i <= B < v] / i), β = P[B >= v].
    """
    success = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(stats.binom.sf(correct - 1, guesses, success))
    shortfalls = np.arange(1, correct + 1)
    if delta == 0.0 or correct == 0:
        return min(1.0, beta)
    below = np.cumsum(stats.binom.pmf(correct - shortfalls, guesses, success))
    return min(1.0, beta + 2.0 * canaries * delta * float((below / shortfalls).max()))


def one_run_epsilon(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """Lower bound of ε at `confidence` from the guesses of one run; see `one_run_pvalue`. 0 where nothing follows."""
    error = 1.0 - confidence
    if one_run_pvalue(correct, guesses, canaries, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, 40.0
    if one_run_pvalue(correct, guesses, canaries, high, delta) <= error:
        return high
    while high - low > 1e-4:
        middle = 0.5 * (low + high)
        refuted = one_run_pvalue(correct, guesses, canaries, middle, delta) <= error
        low, high = (middle, high) if refuted else (low, middle)
    return low


def one_run_scores_epsilon(
    scores: FloatArray, included: NDArray[np.bool_], delta: float, confidence: float
) -> tuple[float, int, int]:
    """Best lower bound of ε over four numbers of guesses, the confidence shared among them.

    Args:
        scores: (m,) larger where a canary looks included.
        included: (m,) the coins.
        delta: δ of the claim.
        confidence: of the bound.

    Returns:
        (ε, correct guesses, guesses) of the best number of guesses: as many highest as lowest scores.
    """
    count = len(scores)
    order = np.argsort(scores)
    best = (0.0, 0, 0)
    shares = (0.05, 0.1, 0.2, 0.5)
    for share in shares:
        each = max(1, int(share * count))
        correct = int(included[order[-each:]].sum() + (~included[order[:each]]).sum())
        epsilon = one_run_epsilon(correct, 2 * each, count, delta, 1.0 - (1.0 - confidence) / len(shares))
        best = max(best, (epsilon, correct, 2 * each))
    return best


def one_run_power(mu: float, canaries: int, delta: float, confidence: float) -> float:
    """The bound to be expected if every canary is seen through Gaussian noise of total μ and nothing else.

    Args:
        mu: μ of the whole run for one unit, sqrt(sum of 1/σ²) without sampling.
        canaries: m.
        delta: δ of the claim.
        confidence: of the bound.

    Returns:
        ε: what a correct implementation shows at best; a bound far above says that it is not correct.
    """
    uniform = (np.arange(canaries) + 0.5) / canaries
    included = np.arange(canaries) % 2 == 0
    normal = stats.norm.ppf(uniform)[np.random.default_rng(0).permutation(canaries)]
    return one_run_scores_epsilon(normal + mu * included, included, delta, confidence)[0]
