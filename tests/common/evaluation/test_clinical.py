"""The numbers of findings: small classes, unknown answers, calibration, operating points, agreement of grades."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_auc_score

from common.errors import DataError
from common.evaluation.clinical import (
    calibration_error,
    clinical_scores,
    quadratic_kappa,
    reliability,
    sensitivity_at,
)

NAMES = ("a", "b", "c")


def classes(count: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels, and the probabilities of a middling classifier."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(count) % 3
    logits = torch.randn(count, 3, generator=generator)
    logits[torch.arange(count), labels] += 1.0
    return labels, torch.softmax(logits, dim=1)


def test_classes_are_scored_one_against_the_rest() -> None:
    labels, probabilities = classes()
    found = clinical_scores(labels, probabilities, NAMES)
    areas = [roc_auc_score(labels == k, probabilities[:, k]) for k in range(3)]
    precisions = [average_precision_score(labels == k, probabilities[:, k]) for k in range(3)]
    for finding, name, area, precision in zip(found.findings, NAMES, areas, precisions, strict=True):
        assert (finding.name, finding.positives, finding.negatives, finding.patients) == (name, 30, 60, 30)
        assert finding.auroc is not None
        assert finding.average_precision is not None
        assert finding.auroc.value == pytest.approx(area)
        assert finding.average_precision.value == pytest.approx(precision)
    assert found.auroc is not None
    assert found.average_precision is not None
    assert found.auroc.value == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert found.average_precision.value == pytest.approx(np.mean(precisions))
    for mean in (found.auroc, found.average_precision):
        assert mean.low is not None
        assert mean.high is not None
        assert mean.low < mean.value < mean.high
    assert found.shown == 3
    assert clinical_scores(labels, probabilities, NAMES) == found  # seeded


def test_class_of_one_positive_is_counted_and_not_shown() -> None:
    labels, probabilities = classes()
    labels = torch.where(labels == 2, 0, labels)
    labels[5] = 2
    found = clinical_scores(labels, probabilities, NAMES)
    small = found.findings[2]
    assert (small.positives, small.patients) == (1, 1)
    assert (small.auroc, small.average_precision, small.sensitivity_at_90, small.sensitivity_at_95) == (None,) * 4
    assert found.shown == 2
    areas = [roc_auc_score(labels == k, probabilities[:, k]) for k in range(2)]
    assert found.auroc is not None
    assert found.auroc.value == pytest.approx(np.mean(areas))
    # Two positives are shown, but not two images of one patient.
    labels[8] = 2
    assert clinical_scores(labels, probabilities, NAMES).findings[2].auroc is not None
    units = torch.arange(90)
    units[8] = 5
    one_patient = clinical_scores(labels, probabilities, NAMES, units=units).findings[2]
    assert (one_patient.positives, one_patient.patients, one_patient.auroc) == (2, 1, None)


def test_no_class_with_enough_records_leaves_no_mean() -> None:
    found = clinical_scores(torch.tensor([0, 0]), torch.full((2, 2), 0.5), ("a", "b"))
    assert (found.auroc, found.average_precision, found.shown) == (None, None, 0)


def test_findings_with_unknown_answers_are_scored_where_they_are_known() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(0, 2, (80, 2), generator=generator, dtype=torch.int8)
    probabilities = torch.sigmoid(torch.randn(80, 2, generator=generator) + truth)
    truth[:20, 0] = -1
    found = clinical_scores(truth, probabilities, ("x", "y"), task="multilabel")
    known = truth[20:, 0].numpy()
    assert found.findings[0].auroc is not None
    assert found.findings[0].auroc.value == pytest.approx(roc_auc_score(known, probabilities[20:, 0]))
    assert (found.findings[0].positives, found.findings[0].negatives) == (known.sum(), 60 - known.sum())
    assert sum(one.count for one in found.reliability) == 60 + 80
    right = [(probabilities[truth[:, k] >= 0, k] > 0.5) == truth[truth[:, k] >= 0, k] for k in range(2)]
    assert found.accuracy == pytest.approx(float(torch.cat(right).double().mean()))
    assert found.kappa is None


def test_reliability_and_its_error_by_hand() -> None:
    # 0.62 and 0.66 lie in one bin (mean 0.64, half right), 1.0 in the last (right), 0.1 in the second (wrong).
    bins = reliability(np.array([0.62, 0.66, 1.0, 0.1]), np.array([True, False, True, False]))
    assert [(one.probability, one.share, one.count) for one in bins] == [
        (pytest.approx(0.1), 0.0, 1),
        (pytest.approx(0.64), 0.5, 2),
        (1.0, 1.0, 1),
    ]
    assert calibration_error(bins) == pytest.approx((0.1 + 2 * 0.14 + 0.0) / 4)
    assert calibration_error(()) == 0.0


def test_sensitivity_at_a_specificity_by_hand() -> None:
    # 20 negatives at 1..20; positives at 18.5 (2 negatives above it), 19.5 (1), 30 (0) and 0.
    scores = np.array([*range(1, 21), 18.5, 19.5, 30, 0], dtype=float)
    truth = np.arange(24) >= 20
    assert sensitivity_at(truth, scores, 0.90) == 0.75
    assert sensitivity_at(truth, scores, 0.95) == 0.5
    assert sensitivity_at(truth, scores, 1.0) == 0.25
    scores[:] = 1.0  # all tied: a threshold takes all or none
    assert sensitivity_at(truth, scores, 0.90) == 0.0


def test_quadratic_kappa_by_hand() -> None:
    grades, said = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0])
    # Observed disagreement: one of four off by two, (2 - 0)²/4 = 1. Expected from margins (1, 1, 2)/4 and (2, 1, 1)/4:
    # Σ p_i q_j (i - j)² = (1·1·1 + 1·1·4 + 1·2·1 + 1·1·1 + 2·2·4 + 2·1·1)/16 = 26/16.
    assert quadratic_kappa(grades, said, 3) == pytest.approx(1 - 1 / (26 / 16))
    assert quadratic_kappa(grades, grades, 5) == 1.0
    assert quadratic_kappa(grades, said, 3) == pytest.approx(cohen_kappa_score(grades, said, weights="quadratic"))


def test_grades_are_scored_by_their_thresholds_and_their_agreement() -> None:
    grades = torch.tensor([0, 1, 2, 2, 0, 1, 2, 0])
    # That the grade is "mild or higher", "severe or higher"; the fourth record is taken for mild, the seventh for none.
    probabilities = torch.tensor(
        [[0.1, 0.0], [0.8, 0.3], [0.9, 0.7], [0.7, 0.4], [0.2, 0.1], [0.6, 0.2], [0.4, 0.45], [0.3, 0.2]]
    )
    found = clinical_scores(grades, probabilities, ("none", "mild", "severe"), task="ordinal")
    assert [one.name for one in found.findings] == ["mild or higher", "severe or higher"]
    assert [one.positives for one in found.findings] == [5, 3]
    said = torch.tensor([0, 1, 2, 1, 0, 1, 0, 0])
    assert found.accuracy == 6 / 8
    assert found.balanced_accuracy == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert found.kappa == pytest.approx(cohen_kappa_score(grades, said, weights="quadratic"))
    assert found.findings[1].auroc is not None
    assert found.findings[1].auroc.value == pytest.approx(roc_auc_score(grades == 2, probabilities[:, 1]))
    one_grade = clinical_scores(torch.tensor([0, 0]), torch.full((2, 1), 0.1), ("a", "b"), task="ordinal")
    assert one_grade.kappa is None


def test_clinical_scores_refuse_other_shapes() -> None:
    labels, probabilities = classes()
    with pytest.raises(DataError, match="n >= 1"):
        clinical_scores(labels[:0], probabilities[:0], NAMES)
    with pytest.raises(DataError, match="found"):
        clinical_scores(labels, probabilities, ("a", "b"))
    with pytest.raises(DataError, match="multilabel"):
        clinical_scores(labels, probabilities, NAMES, task="multilabel")
    with pytest.raises(DataError, match="units"):
        clinical_scores(labels, probabilities, NAMES, units=torch.arange(3))
