"""How well scores rank the positives of a finding before its negatives, with intervals that know of patients.

Computed on a site's records, these numbers are not private: they stay where the records are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

CONFIDENCE = 0.95
DRAWS = 500
_BLOCK = 4_000_000  # weights in memory at once

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A number in [0, 1] with its interval at `CONFIDENCE`; without one where the records don't give one."""

    value: float
    low: float | None = None
    high: float | None = None


def auroc(truth: Flags, scores: Floats, units: NDArray[np.int64] | None = None) -> Estimate:
    """Area under the ROC curve, with an interval from the nonparametric variance of clustered records.

    Where each unit has one record the variance is DeLong's. The interval is symmetric on the logit scale, so that it
    stays in [0, 1].

    Args:
        truth: (n,) whether the finding is present; at least one record is positive and one negative.
        scores: (n,) higher for a more likely finding; ties count a half.
        units: (n,) patient of each record; left out, each record is its own.

    Returns:
        The estimate. It has no interval where fewer than two units are positive, or negative, or where the estimated
        variance is zero, as it is for a perfect ranking: an interval of no width would claim certainty.

    Raises:
        DataError: no positive or no negative record.

    Source: DeLong et al. 1988; by midranks, Sun and Xu 2014; by clusters, Obuchowski 1997.
    """
    from scipy.stats import rankdata

    positives, negatives = int(truth.sum()), int((~truth).sum())
    if positives == 0 or negatives == 0:
        raise DataError(f"expected positive and negative records, found {positives} and {negatives}")
    ranks = rankdata(scores)
    # Of each positive, the share of negatives below it; of each negative, the share of positives above it.
    above = (ranks[truth] - rankdata(scores[truth])) / negatives
    below = 1 - (ranks[~truth] - rankdata(scores[~truth])) / positives
    area = float(above.mean())
    member = np.arange(len(truth)) if units is None else np.unique(units, return_inverse=True)[1]
    count = int(member.max()) + 1
    with_positives, with_negatives = len(np.unique(member[truth])), len(np.unique(member[~truth]))
    if min(with_positives, with_negatives) < 2:
        return Estimate(area)
    deviation = np.bincount(member[truth], above - area, count)
    rival = np.bincount(member[~truth], below - area, count)
    variance = (
        with_positives / (with_positives - 1) * float(deviation @ deviation) / positives**2
        + with_negatives / (with_negatives - 1) * float(rival @ rival) / negatives**2
        + 2 * count / (count - 1) * float(deviation @ rival) / (positives * negatives)
    )
    if not (variance > 1e-15 and 0 < area < 1):
        return Estimate(area)
    width = _normal_quantile() * math.sqrt(variance) / (area * (1 - area))
    middle = math.log(area / (1 - area))
    return Estimate(area, _sigmoid(middle - width), _sigmoid(middle + width))


def bootstrap(
    truth: NDArray[np.int8],
    scores: Floats,
    units: NDArray[np.int64] | None,
    seed: int,
    draws: int = DRAWS,
) -> tuple[Floats, Floats]:
    """AUROC and average precision of each finding under random weights of the units.

    The weights are exponential (the Bayesian bootstrap), so that no draw loses a rare finding, as drawing units with
    replacement would.

    Args:
        truth: (n, K) with 1 present, 0 absent, -1 unknown; each finding has a positive and a negative record.
        scores: (n, K) higher for a more likely finding.
        units: (n,) patient of each record, whose records share a weight; None for one each.
        seed: of the weights.
        draws: how many.

    Returns:
        Two arrays (draws, K).

    Source: Rubin 1981.
    """
    rng = np.random.default_rng(seed)
    member = np.arange(len(truth)) if units is None else np.unique(units, return_inverse=True)[1]
    areas, precisions = np.empty((draws, truth.shape[1])), np.empty((draws, truth.shape[1]))
    step = max(1, _BLOCK // len(truth))
    for first in range(0, draws, step):
        block = slice(first, min(first + step, draws))
        weights = rng.exponential(size=(block.stop - first, int(member.max()) + 1))[:, member]
        for finding in range(truth.shape[1]):
            known = truth[:, finding] >= 0
            found = weighted_ranking(truth[known, finding] == 1, scores[known, finding], weights[:, known])
            areas[block, finding], precisions[block, finding] = found
    return areas, precisions


def weighted_ranking(truth: Flags, scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """AUROC and average precision under each row of weights, ties counted a half and taken as one threshold.

    Args:
        truth: (n,) at least one positive and one negative.
        scores: (n,).
        weights: (B, n), above 0.

    Returns:
        Two arrays (B,).
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    sorted_weights = weights[:, order]
    true = np.cumsum(sorted_weights * truth[order], axis=1)[:, ends]
    false = np.cumsum(sorted_weights * ~truth[order], axis=1)[:, ends]
    gained = np.diff(true, axis=1, prepend=0.0)
    areas = (np.diff(false, axis=1, prepend=0.0) * (true - gained / 2)).sum(axis=1)
    precisions = (gained * true / (true + false)).sum(axis=1)
    return areas / (true[:, -1] * false[:, -1]), precisions / true[:, -1]


def percentile_estimate(value: float, drawn: Floats) -> Estimate:
    """A value with the middle `CONFIDENCE` of its bootstrap's draws; no interval where all draws agree."""
    low, high = (float(found) for found in np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    return Estimate(value, low, high) if high - low > 1e-12 else Estimate(value)


def _normal_quantile() -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + CONFIDENCE) / 2))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
