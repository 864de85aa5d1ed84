"""Tables and figures of what a published set is worth: shared by `evaluate`, `train` and a site's page."""

from __future__ import annotations

from collections.abc import Mapping

from common.evaluation.clinical import FEWEST, ClinicalScores, FindingScores
from common.evaluation.ranking import Estimate
from common.publishing.worth import HEADS, WAYS, Evaluation, HeadScores
from deploy.report import draw
from embeddings.quality.page import Grid, Picture

COMMONEST = "the commonest answer"
TOO_FEW = "too few"
HOW_TO_READ = (
    "In brackets: 95 % intervals, over patients where they are known. A ranking by chance has AUROC 0.5, and the share "
    "of the class as average precision."
)


def score_grid(scores: Mapping[str, ClinicalScores], found: Evaluation | None = None) -> Grid:
    """One row for each way to train; with `found`, a last one that always gives the commonest answer.

    Args:
        scores: what a classifier learned from -> its scores.
        found: whose commonest answer; left out, no row for it.
    """
    rows: list[tuple[str, ...]] = [
        (
            label,
            _percent(one.accuracy, one.balanced_accuracy),
            interval(one.auroc),
            interval(one.average_precision),
        )
        for label, one in scores.items()
    ]
    if found is not None:
        baseline = found.commonest
        rows.append((COMMONEST, _percent(baseline.accuracy, baseline.balanced_accuracy), "0.500", ""))
    columns: tuple[str, ...] = ("trained on", "accuracy / balanced, %", "AUROC", "average precision")
    kappas = [one.kappa for one in scores.values()]
    if any(kappa is not None for kappa in kappas):
        columns = (*columns, "quadratic kappa")
        cells = ["" if kappa is None else f"{kappa:.3f}" for kappa in [*kappas, None]]
        rows = [(*row, cell) for row, cell in zip(rows, cells, strict=False)]
    return Grid(columns, tuple(rows), (False, *[True] * (len(columns) - 1)))


def ways_of(scores: HeadScores) -> dict[str, ClinicalScores]:
    """The scores of one kind of head by what it was trained on, in words."""
    return {label: getattr(scores, way) for way, label in WAYS.items()}


def class_grid(scores: Mapping[str, ClinicalScores], *, intervals: bool = True) -> Grid:
    """One row for each class or finding: how many records stand behind it, and its AUROC by what was trained on."""
    first = next(iter(scores.values()))
    rows = []
    for at, finding in enumerate(first.findings):
        areas = [one.findings[at].auroc for one in scores.values()]
        cells = (interval(area) if intervals or area is None else f"{area.value:.3f}" for area in areas)
        rows.append((finding.name, support(finding), *cells))
    return Grid(("label", "records with it", *scores), tuple(rows), (False, *[True] * (1 + len(scores))))


def detail_grid(scores: ClinicalScores) -> Grid:
    """One row for each class or finding with all that is known of one classifier."""
    rows = [
        (
            finding.name,
            support(finding),
            interval(finding.auroc),
            interval(finding.average_precision),
            _share(finding.sensitivity_at_90),
            _share(finding.sensitivity_at_95),
        )
        for finding in scores.findings
    ]
    columns = ("label", "records with it", "AUROC", "average precision")
    operating = ("sensitivity at 90 % specificity", "sensitivity at 95 % specificity")
    return Grid((*columns, *operating), tuple(rows), (False, *[True] * 5))


def support(finding: FindingScores) -> str:
    """How many records have a class or finding, of how many where it is known, and of how many patients."""
    known = finding.positives + finding.negatives
    text = f"{finding.positives:,} of {known:,}"
    return text if finding.patients == finding.positives else f"{text} ({finding.patients:,} patients)"


def interval(estimate: Estimate | None) -> str:
    """A number with its interval in brackets, where it has one."""
    if estimate is None:
        return TOO_FEW
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"


def few_in_words(scores: ClinicalScores) -> str:
    """Which classes the means leave out, and why; empty where they leave out none."""
    total = len(scores.findings)
    if scores.shown == total:
        return ""
    return (
        f"AUROC and average precision are over {scores.shown} of {total} classes: of the others, fewer than {FEWEST} "
        "patients (or records, where no patients are known) have the class, or lack it."
    )


def calibration_in_words(scores: Mapping[str, ClinicalScores]) -> str:
    """The calibration error by what was trained on."""
    return f"Calibration error: {', '.join(f'{label} {one.calibration_error:.3f}' for label, one in scores.items())}."


def balanced_dots(found: Evaluation) -> Picture:
    """Balanced accuracy of each kind of head, by what it was trained on."""
    values = {
        label: {HEADS[kind]: getattr(scores, way).balanced_accuracy for kind, scores in found.scores.items()}
        for way, label in WAYS.items()
    }
    caption = "On your own test images, which no classifier was trained on; farther right is better."
    return draw.score_dots(values, "What the published set adds to your own data", caption, "kind of classifier")


def reliability_curves(scores: Mapping[str, ClinicalScores]) -> Picture:
    """Share of right answers against the probability that was claimed, a curve for each way to train."""
    figure, axes = draw.new_figure(4.6, 4.2)
    axes.plot([0, 100], [0, 100], color="#8a94a3", linewidth=1.2, linestyle="--", label="taken at its word")
    rows = []
    for index, (label, one) in enumerate(scores.items()):
        claimed, right = ([100 * getattr(each, name) for each in one.reliability] for name in ("probability", "share"))
        axes.plot(
            claimed, right, draw.MARKS[index], linestyle="-", color=draw.COLOURS[index], label=label, markersize=6
        )
        for each, claim, share in zip(one.reliability, claimed, right, strict=True):
            rows.append((label, f"{claim:.1f}", f"{share:.1f}", f"{each.count:,}"))
    axes.set_xlabel("probability claimed, %")
    axes.set_ylabel("right, %")
    axes.grid(color="#d9dee5", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9.5)
    caption = (
        "Answers in ten groups by the probability that the classifier claimed. Below the dashed line it is too sure of "
        f"itself, above it not sure enough. {calibration_in_words(scores)}"
    )
    alt = f"Line chart of the share of right answers by claimed probability. {calibration_in_words(scores)}"
    grid = Grid(("trained on", "claimed, %", "right, %", "answers"), tuple(rows), (False, True, True, True))
    return draw.as_picture(figure, "Can its probabilities be taken at their word?", caption, alt, grid)


def _percent(*shares: float) -> str:
    return "/".join(f"{100 * share:.1f}" for share in shares)


def _share(value: float | None) -> str:
    return TOO_FEW if value is None else f"{value:.3f}"
