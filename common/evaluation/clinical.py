"""The numbers that clinicians ask for: of each finding, of all, and how well probabilities are calibrated.

A finding is one yes/no question of a record: each class against the rest, or a finding of a multi-label set. Computed
on a site's records, these numbers are not private: they stay where the records are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from common.errors import DataError
from common.evaluation.ranking import Estimate, Flags, Floats, auroc, bootstrap, percentile_estimate
from common.evaluation.scores import score_decisions
from common.names import Task
from common.records import cumulative

FEWEST = 2
"""Units with the finding, and units without it, that a number needs to be shown."""
SPECIFICITIES = (0.90, 0.95)
_BINS = 10


@dataclass(frozen=True)
class FindingScores:
    """One finding on the records where it is known.

    Attributes:
        name: of the finding, or of the class that stands against the rest.
        positives: records with it. negatives: records without it.
        patients: units with it: patients where they are known, else records.
        auroc: area under the ROC curve; None, as all below, where fewer than `FEWEST` units have it or lack it.
        average_precision: area under precision and recall; a ranking by chance gets the share of positives.
        sensitivity_at_90: share of positives found where at least 90 % of the negatives are not; the threshold is
            chosen on the same records.
        sensitivity_at_95: the same at 95 %.
    """

    name: str
    positives: int
    negatives: int
    patients: int
    auroc: Estimate | None = None
    average_precision: Estimate | None = None
    sensitivity_at_90: float | None = None
    sensitivity_at_95: float | None = None


@dataclass(frozen=True)
class ReliabilityBin:
    """Answers of similar probability: their mean probability, the share that is right, and how many they are."""

    probability: float
    share: float
    count: int


@dataclass(frozen=True)
class ClinicalScores:
    """How often decisions are right, the findings and their means, and the calibration.

    Attributes:
        accuracy: as in `SiteScores`. balanced_accuracy: the same. Of grades, whether the grade is right.
        kappa: of grades, agreement beyond chance with quadratic weights, in [-1, 1]; None of all else, and where there
            is one grade alone.
        auroc: mean over the findings that have one; None where none has. Its interval is from the bootstrap over units.
        average_precision: as `auroc`.
        calibration_error: expected calibration error, in [0, 1].
        reliability: the bins behind it, in order of probability; bins without an answer are left out.
        findings: in the order of the outputs.
    """

    accuracy: float
    balanced_accuracy: float
    kappa: float | None
    auroc: Estimate | None
    average_precision: Estimate | None
    calibration_error: float
    reliability: tuple[ReliabilityBin, ...]
    findings: tuple[FindingScores, ...]

    @property
    def shown(self) -> int:
        """How many findings the means are over."""
        return sum(finding.auroc is not None for finding in self.findings)


def clinical_scores(
    labels: Tensor,
    probabilities: Tensor,
    names: Sequence[str],
    *,
    task: Task = "multiclass",
    units: Tensor | None = None,
    seed: int = 0,
) -> ClinicalScores:
    """All numbers of one classifier on one set of test records.

    Args:
        labels: (n,) classes or grades 0..K-1, n >= 1; or findings (n, K) with 1 present, 0 absent, -1 unknown.
        probabilities: (n, K): of the classes, rows summing to one; or of each finding. Of grades (n, K - 1): that the
            grade is k + 1 or higher.
        names: of the K classes, findings or grades.
        task: what the labels are.
        units: (n,) patient of each record; left out, each record is its own.
        seed: of the bootstrap.

    Returns:
        The numbers. For classes the calibration is that of the likeliest class's probability, for findings that of
        each known answer.

    Raises:
        DataError: "expected ..., found ..." where shapes disagree or there is no record.
    """
    outputs = finding_names(names, task)
    if len(labels) == 0 or probabilities.shape != (len(labels), len(outputs)):
        raise DataError(
            f"expected probabilities (n, {len(outputs)}) of n >= 1 records, found {tuple(probabilities.shape)} for "
            f"{len(labels)}"
        )
    shape = probabilities.shape if task == "multilabel" else probabilities.shape[:1]
    if labels.shape != shape or (units is not None and units.shape != labels.shape[:1]):
        raise DataError(f"expected labels of a {task} task and units (n,), found {tuple(labels.shape)}")
    findings = as_findings(labels, len(names), task)
    truth, scores = findings.numpy().astype(np.int8), probabilities.double().numpy()
    members = np.arange(len(truth)) if units is None else units.numpy()
    counted = [_counted(name, truth[:, at], members) for at, name in enumerate(outputs)]
    shown = [at for at, finding in enumerate(counted) if _enough(finding, truth[:, at], members)]
    areas, precisions = bootstrap(truth[:, shown], scores[:, shown], members, seed)
    for place, at in enumerate(shown):
        known = truth[:, at] >= 0
        one = truth[known, at] == 1, scores[known, at]
        counted[at] = _measured(counted[at], *one, members[known], precisions[:, place])
    if task == "multiclass":
        sure, answers = probabilities.max(dim=1)
        bins = reliability(sure.double().numpy(), (answers == labels).numpy())
    else:
        bins = reliability(scores[truth >= 0], truth[truth >= 0] == 1)
    decisions = decide(probabilities, task)
    decided = score_decisions(labels, decisions)
    return ClinicalScores(
        decided.accuracy,
        decided.balanced_accuracy,
        quadratic_kappa(labels, decisions, len(names)) if task == "ordinal" else None,
        _mean([counted[at].auroc for at in shown], areas),
        _mean([counted[at].average_precision for at in shown], precisions),
        calibration_error(bins),
        bins,
        tuple(counted),
    )


def finding_names(names: Sequence[str], task: Task) -> tuple[str, ...]:
    """What a classifier's outputs are called: K grades have K - 1 of them."""
    return tuple(f"{name} or higher" for name in names[1:]) if task == "ordinal" else tuple(names)


def as_findings(labels: Tensor, num_classes: int, task: Task) -> Tensor:
    """Labels as yes/no answers: (n, K) int8, of grades (n, K - 1); findings as they are."""
    if task == "multiclass":
        return functional.one_hot(labels, num_classes).to(torch.int8)
    return cumulative(labels, num_classes) if task == "ordinal" else labels


def decide(probabilities: Tensor, task: Task) -> Tensor:
    """The likeliest class (n,); the findings (n, K) that are likelier than not; the grade (n,) that is the median.

    Args:
        probabilities: as `clinical_scores`.
        task: what the labels are.
    """
    if task == "multiclass":
        return probabilities.argmax(1)
    likely = probabilities > 0.5
    return likely.sum(1) if task == "ordinal" else likely


def grade_probabilities(reached: Tensor) -> Tensor:
    """One probability a grade.

    Args:
        reached: (n, K - 1) that the grade is k + 1 or higher; a higher grade is never taken for likelier than a lower.

    Returns:
        (n, K), rows summing to one.

    Source: Frank and Hall 2001, sec. 2.
    """
    falling = reached.cummin(dim=1).values
    ends = falling.new_ones(len(falling), 1)
    return torch.cat([ends, falling], 1) - torch.cat([falling, 0 * ends], 1)


def reliability(probabilities: Floats, right: Flags) -> tuple[ReliabilityBin, ...]:
    """Answers in ten bins of equal width.

    Args:
        probabilities: (n,) in [0, 1], what was claimed.
        right: (n,) whether it was so.

    Source: Guo et al. 2017, section 2.
    """
    place = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
    counts = np.bincount(place, minlength=_BINS)
    claimed, true = (np.bincount(place, values, _BINS) for values in (probabilities, right))
    return tuple(
        ReliabilityBin(float(claimed[at] / counts[at]), float(true[at] / counts[at]), int(counts[at]))
        for at in np.flatnonzero(counts)
    )


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Expected calibration error: the mean over answers of the gap between claim and truth in their bin; 0 without any.

    Source: Guo et al. 2017, eq. 3.
    """
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.share - one.probability) for one in bins) / max(total, 1)


def sensitivity_at(truth: Flags, scores: Floats, specificity: float) -> float:
    """The largest share of positives found by a threshold that leaves out so many of the negatives.

    Args:
        truth: (n,) at least one positive and one negative.
        scores: (n,) higher for a more likely finding.
        specificity: in [0, 1].
    """
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    return float(true[1 - false >= specificity - 1e-12].max())


def quadratic_kappa(grades: Tensor, predictions: Tensor, num_grades: int) -> float | None:
    """Cohen's kappa with quadratic weights: agreement of grades beyond chance; None where all are of one grade.

    Args:
        grades: (n,) in 0..num_grades-1, n >= 1.
        predictions: (n,).
        num_grades: K.

    Source: Cohen 1968.
    """
    from sklearn.metrics import cohen_kappa_score

    if len(torch.unique(torch.cat([grades, predictions]))) < 2:
        return None
    known = list(range(num_grades))
    return float(cohen_kappa_score(grades.numpy(), predictions.numpy(), labels=known, weights="quadratic"))


def _counted(name: str, truth: NDArray[np.int8], members: NDArray[np.int64]) -> FindingScores:
    positives, negatives = int((truth == 1).sum()), int((truth == 0).sum())
    return FindingScores(name, positives, negatives, len(np.unique(members[truth == 1])))


def _enough(finding: FindingScores, truth: NDArray[np.int8], members: NDArray[np.int64]) -> bool:
    return min(finding.patients, len(np.unique(members[truth == 0]))) >= FEWEST


def _measured(
    finding: FindingScores, truth: Flags, scores: Floats, members: NDArray[np.int64], drawn: Floats
) -> FindingScores:
    from sklearn.metrics import average_precision_score

    return replace(
        finding,
        auroc=auroc(truth, scores, members),
        average_precision=percentile_estimate(float(average_precision_score(truth, scores)), drawn),
        sensitivity_at_90=sensitivity_at(truth, scores, SPECIFICITIES[0]),
        sensitivity_at_95=sensitivity_at(truth, scores, SPECIFICITIES[1]),
    )


def _mean(found: Sequence[Estimate | None], drawn: Floats) -> Estimate | None:
    """The mean of the findings' values, with the interval of the mean of their draws (draws, K)."""
    values = [one.value for one in found if one is not None]
    return percentile_estimate(float(np.mean(values)), drawn.mean(axis=1)) if values else None
