"""AUROC, average precision and their intervals: against values worked by hand, scikit-learn, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from common.errors import DataError
from common.evaluation.ranking import auroc, bootstrap, percentile_estimate, weighted_ranking


def variance_of(low: float | None, high: float | None, area: float) -> float:
    """The variance behind an interval that is symmetric on the logit scale."""
    assert low is not None
    assert high is not None
    width = (math.log(high / (1 - high)) - math.log(low / (1 - low))) / 2
    return float((width / norm.ppf(0.975) * area * (1 - area)) ** 2)


def test_delong_by_hand() -> None:
    """Positives 4, 2, 2; negatives 1, 3, 2, 0.

    Of the positives, 4 is above all negatives (V10 = 1); each 2 is above 1 and 0 and ties with 2 (2.5/4 = 0.625). Of
    the negatives, 1 and 0 are below all positives (V01 = 1), 3 below one (1/3), 2 below one and tied with two (2/3).
    The area is 9/12 = 0.75. S10 = (0.25² + 2·0.125²)/2 = 0.046875; S01 = (2·0.25² + (5/12)² + (1/12)²)/3 = 0.101852.
    The variance is S10/3 + S01/4 = 0.041088.
    """
    truth = np.array([1, 1, 1, 0, 0, 0, 0], dtype=bool)
    found = auroc(truth, np.array([4.0, 2.0, 2.0, 1.0, 3.0, 2.0, 0.0]))
    assert found.value == pytest.approx(0.75)
    by_hand = 0.046875 / 3 + (2 * 0.0625 + 25 / 144 + 1 / 144) / 3 / 4
    assert variance_of(found.low, found.high, 0.75) == pytest.approx(by_hand)


def test_obuchowski_by_hand() -> None:
    """Three patients: A has a positive at 3, a negative at 1; B a positive at 2, a negative at 2; C a negative at 0.

    V10: the positive at 3 is above all three negatives (1); that at 2 above 1 and 0, tied with 2 (2.5/3 = 5/6). V01:
    the negatives 1 and 0 are below both positives (1), 2 is below one and tied with one (3/4). The area is 5.5/6 =
    11/12. Deviations by patient: positives A 1/12, B -1/12; negatives A 1/12, B -1/6, C 1/12. Two patients have
    positives, three negatives: S10 = 2/(1·2) · 2/144 = 1/72; S01 = 3/(2·3) · (1 + 4 + 1)/144 = 1/48;
    S11 = 3/2 · (1 + 2 + 0)/144 = 1/32. The variance is S10/2 + S01/3 + 2·S11/6 = 1/144 + 1/144 + 1/96.
    """
    truth, scores = np.array([1, 0, 1, 0, 0], dtype=bool), np.array([3.0, 1.0, 2.0, 2.0, 0.0])
    found = auroc(truth, scores, np.array([7, 7, 3, 3, 9]))
    assert found.value == pytest.approx(11 / 12)
    assert variance_of(found.low, found.high, 11 / 12) == pytest.approx(2 / 144 + 1 / 96)


def test_clustered_form_of_one_record_each_is_delongs() -> None:
    """And so is the textbook form of DeLong's, a double loop over pairs."""
    rng = np.random.default_rng(5)
    truth = rng.random(60) < 0.3
    scores = np.round(rng.normal(size=60) + truth, 1)  # rounded: ties
    found = auroc(truth, scores)
    assert auroc(truth, scores, rng.permutation(60)) == found
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    wins = np.subtract.outer(scores[truth], scores[~truth])
    pairs = (wins > 0) + 0.5 * (wins == 0)
    by_loop = pairs.mean(1).var(ddof=1) / truth.sum() + pairs.mean(0).var(ddof=1) / (~truth).sum()
    assert variance_of(found.low, found.high, found.value) == pytest.approx(float(by_loop))


def test_interval_of_patients_does_not_shrink_by_copies() -> None:
    """Each record three times under its patient: the clustered interval stays, the naive one claims too much."""
    rng = np.random.default_rng(6)
    truth = rng.random(80) < 0.4
    scores = rng.normal(size=80) + truth
    once = auroc(truth, scores)
    copies = np.repeat(truth, 3), np.repeat(scores, 3)
    clustered, naive = auroc(*copies, np.repeat(np.arange(80), 3)), auroc(*copies)
    assert (clustered.value, clustered.low) == (pytest.approx(once.value), pytest.approx(once.low))
    assert naive.low is not None
    assert once.low is not None
    assert naive.low > once.low


@pytest.mark.parametrize(
    ("truth", "scores", "units"),
    [
        ([1, 0, 0], [0.9, 0.1, 0.2], None),  # one positive
        ([1, 1, 0], [0.9, 0.1, 0.2], None),  # one negative
        ([1, 1, 0, 0], [0.9, 0.1, 0.2, 0.3], [4, 4, 5, 6]),  # two positives of one patient
        ([1, 1, 0, 0], [0.9, 0.8, 0.2, 0.3], None),  # a perfect ranking
        ([1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], None),  # all tied
    ],
)
def test_no_interval_where_the_records_give_none(
    truth: list[int], scores: list[float], units: list[int] | None
) -> None:
    found = auroc(np.array(truth, dtype=bool), np.array(scores), None if units is None else np.array(units))
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    assert (found.low, found.high) == (None, None)


def test_auroc_refuses_records_of_one_kind() -> None:
    with pytest.raises(DataError, match="found 2 and 0"):
        auroc(np.ones(2, dtype=bool), np.arange(2.0))


def test_weighted_ranking_is_scikit_learns() -> None:
    rng = np.random.default_rng(7)
    truth, weights = rng.random(50) < 0.3, rng.exponential(size=(4, 50))
    scores = np.round(rng.normal(size=50) + truth, 1)
    areas, precisions = weighted_ranking(truth, scores, weights)
    for row in range(4):
        assert areas[row] == pytest.approx(roc_auc_score(truth, scores, sample_weight=weights[row]))
        assert precisions[row] == pytest.approx(average_precision_score(truth, scores, sample_weight=weights[row]))


def test_bootstrap_is_seeded_masks_unknown_records_and_weighs_patients_whole() -> None:
    rng = np.random.default_rng(8)
    truth = (rng.random((40, 2)) < 0.4).astype(np.int8)
    scores = rng.normal(size=(40, 2)) + truth
    patients = np.arange(40) // 2
    first = bootstrap(truth, scores, patients, seed=3, draws=20)
    np.testing.assert_array_equal(first, bootstrap(truth, scores, patients, seed=3, draws=20))
    assert not np.array_equal(first, bootstrap(truth, scores, patients, seed=4, draws=20))
    truth[:6, 1] = -1
    masked = bootstrap(truth, scores, patients, seed=3, draws=20)
    np.testing.assert_array_equal(masked[0][:, 0], first[0][:, 0])
    scores[:6, 1] = 99.0  # an unknown record's score plays no part
    np.testing.assert_array_equal(masked, bootstrap(truth, scores, patients, seed=3, draws=20))
    # Copies of each record under the same patient change nothing: the patient has one weight.
    twice = bootstrap(np.repeat(truth, 2, 0), np.repeat(scores, 2, 0), np.repeat(patients, 2), seed=3, draws=20)
    np.testing.assert_allclose(twice, masked, rtol=1e-12)


def test_bootstrap_spreads_as_delongs_variance_says() -> None:
    """The two agree at 300 records: 400 draws give the standard error to within some 4 %."""
    rng = np.random.default_rng(9)
    truth = rng.random(300) < 0.3
    scores = rng.normal(size=300) + truth
    found = auroc(truth, scores)
    areas, _ = bootstrap(truth[:, None].astype(np.int8), scores[:, None], None, seed=0, draws=400)
    assert areas.std() == pytest.approx(math.sqrt(variance_of(found.low, found.high, found.value)), rel=0.15)
    assert areas.mean() == pytest.approx(found.value, abs=0.005)


def test_percentile_estimate_shows_no_interval_without_width() -> None:
    assert percentile_estimate(1.0, np.ones(9)).low is None
    found = percentile_estimate(0.5, np.linspace(0, 1, 1001))
    assert (found.low, found.high) == (pytest.approx(0.025), pytest.approx(0.975))
