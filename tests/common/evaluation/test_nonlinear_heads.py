"""Nearest-neighbour and network heads against scikit-learn, loops and tasks that no linear head solves."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from common.errors import ConfigError, DataError
from common.evaluation.heads import fit_linear_head
from common.evaluation.nonlinear_heads import MLPConfig, fit_mlp_head, fit_neighbour_head, score_heads
from common.evaluation.scores import score

SMALL = MLPConfig(width=32, epochs=5, min_steps=200, learning_rate=5e-3)


def _rings(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Two classes: an inner and an outer ring, so that no line parts them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=generator)
    angle = 2 * torch.pi * torch.rand(rows, generator=generator)
    radius = 1.0 + labels + 0.1 * torch.randn(rows, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), labels


@pytest.mark.parametrize("chunk", [5, 1024])
def test_neighbour_head_agrees_with_scikit_learn(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=generator), torch.randint(4, (60,), generator=generator)
    test = torch.randn(23, 3, generator=generator)
    expected = KNeighborsClassifier(n_neighbors=7).fit(x.numpy(), y.numpy()).predict_proba(test.numpy())
    found = fit_neighbour_head(x, y, 4, neighbours=7).probabilities(test, chunk=chunk)
    assert torch.allclose(found, torch.from_numpy(expected).float(), atol=1e-6)


def test_neighbour_head_uses_all_rows_where_there_are_few() -> None:
    head = fit_neighbour_head(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 0, 2]), 3, neighbours=15)
    assert torch.allclose(head.probabilities(torch.tensor([[5.0]])), torch.tensor([[2 / 3, 0.0, 1 / 3]]))


def test_mlp_head_learns_what_a_linear_head_cannot() -> None:
    train, test = _rings(1, 600), _rings(2, 400)
    assert score(fit_linear_head(*train, 2), *test).accuracy < 0.7
    head = fit_mlp_head(*train, 2, torch.Generator().manual_seed(3), SMALL)
    assert score(head.probabilities(test[0]), *test).accuracy > 0.95


def test_mlp_head_depends_on_its_generator_alone_and_not_on_scale() -> None:
    x, y = _rings(4, 200)
    torch.manual_seed(1)
    first = fit_mlp_head(x, y, 2, torch.Generator().manual_seed(5), SMALL)
    torch.manual_seed(2)
    again = fit_mlp_head(x, y, 2, torch.Generator().manual_seed(5), SMALL)
    assert torch.equal(first.weight, again.weight)
    other = fit_mlp_head(x, y, 2, torch.Generator().manual_seed(6), SMALL)
    assert not torch.equal(first.weight, other.weight)
    scaled = fit_mlp_head(100 * x, y, 2, torch.Generator().manual_seed(5), SMALL)
    assert torch.allclose(scaled.probabilities(100 * x), first.probabilities(x), atol=1e-2)


def test_mlp_probabilities_are_the_softmax_of_its_logits() -> None:
    x, y = _rings(7, 50)
    head = fit_mlp_head(x, y, 3, torch.Generator().manual_seed(8), MLPConfig(width=4, epochs=1, min_steps=1))
    hidden = ((x - head.center) / head.scale @ head.hidden_weight.T + head.hidden_bias).clamp(min=0)
    expected = torch.softmax(hidden @ head.weight.T + head.bias, dim=1)
    assert torch.allclose(head.probabilities(x), expected, atol=1e-6)


def test_score_heads_scores_each_head_on_the_test_rows() -> None:
    train, test = _rings(9, 400), _rings(10, 200)
    scores = score_heads(train, test, 2, torch.Generator().manual_seed(11), mlp=SMALL)
    assert set(scores) == {"linear", "knn", "mlp"}
    assert scores["linear"].accuracy < 0.7 < 0.95 < min(scores["knn"].accuracy, scores["mlp"].accuracy)


def test_heads_refuse_bad_settings_and_data() -> None:
    x, y = _rings(12, 10)
    with pytest.raises(ConfigError, match="neighbours"):
        fit_neighbour_head(x, y, 2, neighbours=0)
    with pytest.raises(ConfigError, match="width"):
        MLPConfig(width=0)
    with pytest.raises(DataError, match="0 to 1"):
        fit_mlp_head(x, y, 1, torch.Generator())
    with pytest.raises(DataError, match="equal widths"):
        score_heads((x, y), (x[:, :1], y), 2, torch.Generator())


def test_neighbours_that_know_a_finding_vote_on_it_by_hand() -> None:
    # The three nearest of 0 say present, unknown, absent of the first finding; the second is known nowhere.
    rows = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    findings = torch.tensor([[1, -1], [-1, -1], [0, -1], [1, -1]], dtype=torch.int8)
    votes = fit_neighbour_head(rows, findings, 2, neighbours=3).probabilities(torch.tensor([[0.0]]))
    assert torch.allclose(votes, torch.tensor([[(1 + 2 / 3) / 3, 0.0]]))  # two of three records have the first


def test_mlp_head_learns_findings_of_which_some_are_unknown() -> None:
    (x, inner), (unseen, truth) = _rings(7, 600), _rings(8, 400)
    findings = torch.stack([inner, 1 - inner], dim=1).to(torch.int8)
    findings[torch.arange(600) % 5 == 0, 0] = -1
    head = fit_mlp_head(x, findings, 2, torch.Generator().manual_seed(3), SMALL)
    assert head.findings
    answers = torch.stack([truth, 1 - truth], dim=1).to(torch.int8)
    assert score(head.probabilities(unseen), unseen, answers).accuracy > 0.95
