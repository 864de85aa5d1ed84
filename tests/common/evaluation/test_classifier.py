"""Mixing and scores against hand-computed values."""

from __future__ import annotations

import pytest
import torch

from common.errors import ConfigError, DataError
from common.evaluation.heads import FineTuneConfig, LinearHead, fine_tune_head
from common.evaluation.scores import (
    TUNING_GRID,
    SiteScores,
    accuracy,
    balanced_accuracy,
    choose_mixing,
    mean_scores,
    mix_probabilities,
    personal_head,
    score,
    score_decisions,
    score_site,
)


def test_accuracy_and_balanced_accuracy_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 2, 2])
    predictions = torch.tensor([0, 0, 0, 1, 2, 0])
    assert accuracy(labels, predictions) == pytest.approx(4 / 6)
    # Class 1 has no record: the mean is over classes 0 (3/4) and 2 (1/2).
    assert balanced_accuracy(labels, predictions) == pytest.approx((0.75 + 0.5) / 2)


def test_scores_refuse_an_empty_split() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(DataError, match="n >= 1"):
        balanced_accuracy(nothing, nothing)
    with pytest.raises(DataError, match="at least one site"):
        mean_scores([])


def test_mix_probabilities_weights_the_local_head_by_lambda() -> None:
    local, synthetic = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.2, 0.8]])
    assert torch.allclose(mix_probabilities(local, synthetic, 0.25), torch.tensor([[0.375, 0.625]]))
    assert torch.equal(mix_probabilities(local, synthetic, 1.0), local)
    with pytest.raises(ConfigError, match=r"1\.5"):
        mix_probabilities(local, synthetic, 1.5)
    with pytest.raises(DataError, match="equal shapes"):
        mix_probabilities(local, synthetic[:, :1], 0.5)


def test_choose_mixing_takes_the_best_and_breaks_ties_towards_the_default() -> None:
    local = torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    synthetic = torch.tensor([[0.0, 1.0], [0.9, 0.1]])
    # Row 0 is of class 0: right only where 0.6 λ > 0.5, so λ in {0.9, 1.0}; row 1 is right at every λ.
    assert choose_mixing(local, synthetic, torch.tensor([0, 0])) == 0.9
    assert choose_mixing(local, synthetic, torch.tensor([1, 0])) == 0.5
    assert choose_mixing(local[:0], synthetic[:0], torch.zeros(0, dtype=torch.int64), default=0.3) == 0.3


def test_decisions_on_findings_are_scored_where_they_are_known() -> None:
    labels = torch.tensor([[1, 0, -1], [0, -1, -1], [1, 0, -1]], dtype=torch.int8)
    decisions = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    # First finding: sensitivity 1/2, specificity 0; second: known absent twice, right once; the third is never known.
    assert score_decisions(labels, decisions) == SiteScores(2 / 5, (0.25 + 0.5) / 2)


def test_mixing_of_findings_is_chosen_by_their_probabilities() -> None:
    labels = torch.tensor([[1, -1], [0, 0], [0, 0]], dtype=torch.int8)
    sure = torch.tensor([[0.4, 0.9], [0.1, 0.1], [0.1, 0.1]])
    vague = torch.full((3, 2), 0.5)
    assert choose_mixing(sure, vague, labels) == 1.0  # the unknown answer, which it has wrong, plays no part
    assert choose_mixing(vague, sure, labels) == 0.0


def test_personal_head_trusts_a_good_global_head_more_than_a_wrong_one() -> None:
    generator = torch.Generator().manual_seed(0)
    means = 0.6 * torch.randn(4, 20, generator=generator)
    labels = torch.randint(4, (640,), generator=generator)
    rows = means[labels] + torch.randn(640, 20, generator=generator)
    train, validation = (rows[:40], labels[:40]), (rows[40:], labels[40:])
    good = LinearHead(means, -0.5 * means.square().sum(1))  # the law's own Bayes rule
    wrong = LinearHead(good.weight.roll(1, 0), good.bias.roll(1))

    def chosen(head: LinearHead) -> float:
        personal = personal_head(head, train, validation)
        tuned = {scale: fine_tune_head(head, *train, FineTuneConfig(logit_scale=scale)) for scale in TUNING_GRID}
        (scale,) = (scale for scale, one in tuned.items() if torch.equal(one.weight, personal.weight))
        return scale

    assert chosen(good) == max(TUNING_GRID)
    assert chosen(wrong) == min(TUNING_GRID)
    default = fine_tune_head(good, *train)
    assert torch.equal(personal_head(good, train, (rows[:0], labels[:0])).weight, default.weight)


def test_score_takes_a_head_or_its_probabilities() -> None:
    head = LinearHead(torch.tensor([[1.0], [-1.0]]), torch.zeros(2))
    embeddings, labels = torch.tensor([[2.0], [1.0], [-1.0]]), torch.tensor([0, 1, 1])
    expected = SiteScores(pytest.approx(2 / 3), pytest.approx(0.75))
    assert score(head, embeddings, labels) == expected
    assert score(head.probabilities(embeddings), embeddings, labels) == expected


def test_score_site_gives_the_four_scores() -> None:
    # The local head splits at 0, the global head always says class 1 and is very sure of it.
    train = (torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1]))
    test = (torch.tensor([[-1.5], [-0.5], [1.5]]), torch.tensor([0, 0, 1]))
    stubborn = LinearHead(torch.zeros(2, 1), torch.tensor([0.0, 9.0]))
    scores = score_site(train, train, test, stubborn, mixing=0.5)
    assert set(scores) == {"local_only", "synthetic_only", "mixed", "own_lambda"}
    assert scores["local_only"] == SiteScores(1.0, 1.0)
    assert scores["synthetic_only"] == SiteScores(pytest.approx(1 / 3), 0.5)
    assert scores["mixed"].accuracy < 1.0
    assert scores["own_lambda"] == SiteScores(1.0, 1.0)
    without_validation = (train[0][:0], train[1][:0])
    assert score_site(train, without_validation, test, stubborn)["own_lambda"] == scores["mixed"]


def test_mean_scores_is_unweighted() -> None:
    assert mean_scores([SiteScores(1.0, 0.5), SiteScores(0.5, 0.0)]) == SiteScores(0.75, 0.25)
