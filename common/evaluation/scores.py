"""How classifiers of embeddings are mixed and scored; the heads themselves are fitted in `common.evaluation.heads`.

Scores computed on a site's records are not private: they stay at the site unless its policy says that the
data set is public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from common.evaluation.heads import FineTuneConfig, HeadConfig, LinearHead, fine_tune_head, fit_linear_head
from common.findings import label_losses

Split = tuple[Tensor, Tensor]
"""Embeddings (n, d) and labels: classes (n,), or findings (n, K) int8."""

MIXING = 0.5
"""λ of `mixed` where nobody chose one: half a site's own head, half the published one."""
HEAD_SCALE = 0.35
"""Factor of a published head's logits before it is mixed: noise in training makes it overconfident. Mixed heads gain
1.3 points of accuracy and 2.0 of balanced accuracy by it (benchmarks/LOG.md)."""
MIXING_GRID = tuple(step / 10 for step in range(11))
TUNING_GRID = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Factors of a global head's logits, from which a site chooses; 0 leaves the global head out."""


@dataclass(frozen=True)
class SiteScores:
    """Accuracy and balanced accuracy, both in [0, 1], of one classifier on one test split.

    Of findings, accuracy is the share of known answers that are right, and balanced accuracy the mean over findings of
    each one's own.
    """

    accuracy: float
    balanced_accuracy: float


def accuracy(labels: Tensor, predictions: Tensor) -> float:
    """Share of predictions that are right.

    Args:
        labels: (n,), n >= 1.
        predictions: (n,).

    Raises:
        DataError: nothing to score, or lengths differ.
    """
    _check_pair(labels, predictions)
    return float((labels == predictions).double().mean())


def balanced_accuracy(labels: Tensor, predictions: Tensor) -> float:
    """Mean over the classes present in `labels` of the share of each that is found (its recall).

    Args:
        labels: (n,), n >= 1.
        predictions: (n,).

    Raises:
        DataError: nothing to score, or lengths differ.

    Source: Brodersen et al. 2010.
    """
    _check_pair(labels, predictions)
    right = (labels == predictions).double()
    recalls = [float(right[labels == present].mean()) for present in torch.unique(labels)]
    return sum(recalls) / len(recalls)


def mix_probabilities(local: Tensor, synthetic: Tensor, mixing: float) -> Tensor:
    """λ · local + (1 − λ) · synthetic.

    Args:
        local: (n, K) probabilities of the site's own head.
        synthetic: (n, K) probabilities of the head trained on the synthetic set, or of any global head.
        mixing: λ in [0, 1], the weight of `local`.

    Raises:
        ConfigError: λ is outside [0, 1].
        DataError: shapes differ.

    Source: Marfoq et al. 2022, eq. 8.
    """
    if not 0 <= mixing <= 1:
        raise ConfigError(f"mixing must be in [0, 1], found {mixing}")
    if local.shape != synthetic.shape:
        raise DataError(f"expected equal shapes to mix, found {tuple(local.shape)} and {tuple(synthetic.shape)}")
    return mixing * local + (1 - mixing) * synthetic


def choose_mixing(local: Tensor, synthetic: Tensor, labels: Tensor, default: float = 0.5) -> float:
    """The λ of the grid 0, 0.1 ... 1 with the best accuracy, of findings the least cross-entropy; then the nearest.

    Args:
        local: (n, K) probabilities on the validation split.
        synthetic: (n, K).
        labels: (n,), or findings (n, K); with n = 0 the answer is `default`.
        default: λ in [0, 1], to which the nearest of equals is taken.

    Returns:
        λ, which depends on the site's records: it stays there.
    """
    if len(labels) == 0:
        return default

    def merit(mixing: float) -> tuple[float, float]:
        mixed = mix_probabilities(local, synthetic, mixing)
        if labels.ndim == 1:
            return accuracy(labels, mixed.argmax(1)), -abs(mixing - default)
        # what is rare is seldom likelier than not: decisions would not tell one weight from another
        return -float(label_losses(torch.logit(mixed.double(), 1e-6), labels).mean()), -abs(mixing - default)

    return max(MIXING_GRID, key=merit)


def personal_head(global_head: LinearHead, train: Split, validation: Split) -> LinearHead:
    """A site's own fit, pulled towards a global head that is flattened as much as suits the site best.

    How far a noised head can be trusted differs from site to site: each chooses on its validation split, by the mean
    cross-entropy of all rows and that of the classes' means together, so that a class of few records counts in the
    choice, as it does in balanced accuracy. The result depends on the site's records without noise: neither it nor its
    scores may leave the site.

    Args:
        global_head: (K, d), usually trained on the synthetic set.
        train: the site's training split, at least one row.
        validation: the split on which the site chooses; without rows the default of `FineTuneConfig` is taken.

    Returns:
        The personal head.

    Raises:
        DataError: as `fine_tune_head`.
    """
    if len(validation[1]) == 0:
        return fine_tune_head(global_head, *train)
    tuned = [fine_tune_head(global_head, *train, FineTuneConfig(logit_scale=scale)) for scale in TUNING_GRID]
    return choose_head(tuned, validation)


def choose_head(heads: Sequence[LinearHead], validation: Split) -> LinearHead:
    """The head that suits a site's validation rows best, by the measure of `personal_head`; the first without rows."""
    if len(validation[1]) == 0:
        return heads[0]
    return min(heads, key=lambda head: _plain_and_balanced_entropy(head, validation))


def score(classifier: LinearHead | Tensor, embeddings: Tensor, labels: Tensor) -> SiteScores:
    """Accuracy and balanced accuracy of a head, or of probabilities (n, K) computed for these rows.

    A finding is decided to be present where its probability is above a half.
    """
    if labels.ndim == 2:
        chances = classifier.probabilities(embeddings) if isinstance(classifier, LinearHead) else classifier
        return score_decisions(labels, chances > 0.5)
    outputs = classifier.logits(embeddings) if isinstance(classifier, LinearHead) else classifier
    return score_decisions(labels, outputs.argmax(1))


def score_decisions(labels: Tensor, decisions: Tensor) -> SiteScores:
    """Accuracy and balanced accuracy of decisions.

    Args:
        labels: (n,) classes; or findings (n, K) with 1 present, 0 absent, -1 unknown.
        decisions: (n,) classes, or (n, K) of 0 and 1.

    Raises:
        DataError: nothing to score, or shapes differ.
    """
    if labels.ndim == 1:
        return SiteScores(accuracy(labels, decisions), balanced_accuracy(labels, decisions))
    known = labels >= 0
    columns = [at for at in range(labels.shape[1]) if bool(known[:, at].any())]
    balanced = [balanced_accuracy(labels[known[:, at], at], decisions[known[:, at], at]) for at in columns]
    return SiteScores(accuracy(labels[known], decisions[known]), sum(balanced) / max(len(balanced), 1))


def score_site(
    train: Split,
    validation: Split,
    test: Split,
    global_head: LinearHead,
    mixing: float = MIXING,
    config: HeadConfig | None = None,
    local_head: LinearHead | None = None,
) -> dict[str, SiteScores]:
    """What a global head is worth at a site, on the site's own test split.

    Args:
        train: the site's training split; its own head is fitted on it.
        validation: the split on which the site chooses its own λ; may be empty.
        test: the split that is scored, at least one row.
        global_head: usually trained on the synthetic set.
        mixing: the fixed λ of "mixed", in [0, 1].
        config: settings of the site's own fit.
        local_head: the site's own head, where it is fitted already.

    Returns:
        `local_only`, `synthetic_only`, `mixed` (fixed λ) and `own_lambda` (λ chosen on `validation`).
    """
    if local_head is None:
        local_head = fit_linear_head(*train, num_classes=global_head.weight.shape[0], config=config)
    own_mixing = mixing
    if len(validation[1]) > 0:
        own_mixing = choose_mixing(
            local_head.probabilities(validation[0]),
            global_head.probabilities(validation[0]),
            validation[1],
            mixing,
        )
    local, synthetic = local_head.probabilities(test[0]), global_head.probabilities(test[0])
    return {
        "local_only": score(local, *test),
        "synthetic_only": score(synthetic, *test),
        "mixed": score(mix_probabilities(local, synthetic, mixing), *test),
        "own_lambda": score(mix_probabilities(local, synthetic, own_mixing), *test),
    }


def mean_scores(scores: list[SiteScores]) -> SiteScores:
    """The unweighted mean over sites (or seeds)."""
    if len(scores) == 0:
        raise DataError("expected the scores of at least one site, found none")
    return SiteScores(
        sum(one.accuracy for one in scores) / len(scores),
        sum(one.balanced_accuracy for one in scores) / len(scores),
    )


def _plain_and_balanced_entropy(head: LinearHead, rows: Split) -> float:
    """Mean cross-entropy over rows plus, of classes, its mean over those present."""
    losses = label_losses(head.logits(rows[0]), rows[1])
    if head.findings:
        return float(losses.mean())
    classes = [losses[rows[1] == present].mean() for present in torch.unique(rows[1])]
    return float(losses.mean() + torch.stack(classes).mean())


def _check_pair(labels: Tensor, predictions: Tensor) -> None:
    if labels.ndim != 1 or labels.shape != predictions.shape or len(labels) == 0:
        raise DataError(
            "expected labels (n,) and predictions (n,) with n >= 1, found "
            f"{tuple(labels.shape)} and {tuple(predictions.shape)}"
        )
