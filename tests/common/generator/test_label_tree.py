"""The tree of findings: the best of all trees, what is drawn from it, and how often a row has each finding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from common.evaluation.heads import LinearHead
from common.generator.finding_rows import score_offsets, with_offsets
from common.generator.label_tree import LabelTree, fit_tree, joint_shares, mutual_information
from common.generator.row_law import Middle, RowDrawer, RowLaw
from common.generator.row_numbers import row_key
from common.privacy.combined import ReleasedStatistics

COUNTS = torch.tensor([400.0, 300.0, 200.0, 100.0])


def released(pairs: dict[tuple[int, int], float], noise: float = 0.0, total: float = 1000.0) -> ReleasedStatistics:
    """Statistics of four findings whose other pairs are as often together as by chance."""
    both = torch.outer(COUNTS, COUNTS) / total
    for (one, other), count in pairs.items():
        both[one, other] = both[other, one] = count
    both.fill_diagonal_(0.0)
    return ReleasedStatistics(
        total,
        torch.zeros(2),
        COUNTS,
        None,
        None,
        None,
        {"pair_counts": noise},
        known_counts=torch.full((4,), total),
        pair_counts=both,
    )


def test_the_tree_has_the_most_mutual_information_of_all_trees() -> None:
    statistics = released({(0, 1): 250.0, (1, 2): 150.0, (0, 2): 140.0, (2, 3): 60.0, (0, 3): 70.0})
    share = statistics.prevalence
    assert share is not None
    weights = mutual_information(share.double(), joint_shares(statistics))

    def spans(edges: tuple[tuple[int, int], ...]) -> bool:
        reached = {0}
        for _ in range(4):
            reached |= {node for edge in edges if set(edge) & reached for node in edge}
        return len(reached) == 4

    pairs = list(itertools.combinations(range(4), 2))
    trees = [edges for edges in itertools.combinations(pairs, 3) if spans(edges)]
    best = max(trees, key=lambda edges: sum(float(weights[edge]) for edge in edges))
    tree = fit_tree(statistics, 4)
    found = {tuple(sorted((k, parent))) for k, parent in enumerate(tree.parents.tolist()) if parent >= 0}
    assert found == set(best)


def test_drawn_labels_have_the_shares_and_pairs_of_the_release() -> None:
    statistics = released({(0, 1): 250.0, (1, 2): 10.0})
    tree = fit_tree(statistics, 4)
    assert tree.prevalence.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-6)
    labels = tree.draw("test", 1, torch.arange(40_000)).double()
    # five standard errors of a share, rounded up
    assert torch.allclose(labels.mean(0), COUNTS.double() / 1000, atol=0.0125)
    joint = joint_shares(statistics)
    assert float((labels[:, 0] * labels[:, 1]).mean()) == pytest.approx(float(joint[0, 1]), abs=0.0125)
    assert float((labels[:, 1] * labels[:, 2]).mean()) == pytest.approx(float(joint[1, 2]), abs=0.0125)
    assert torch.equal(tree.draw("test", 1, torch.tensor([7, 900])), tree.draw("test", 1, torch.arange(901))[[7, 900]])
    same = LabelTree.of(tree.tensors)
    assert same is not None
    assert torch.equal(same.draw("test", 1, torch.arange(50)), tree.draw("test", 1, torch.arange(50)))


def test_pairs_that_the_noise_explains_join_nothing() -> None:
    assert fit_tree(released({(0, 1): 140.0}, noise=50.0), 4).parents.tolist() == [-1] * 4
    assert fit_tree(released({(0, 1): 250.0}, noise=5.0), 4).parents.tolist() == [-1, 0, -1, -1]


def test_without_statistics_findings_are_even_and_apart() -> None:
    tree = fit_tree(None, 3)
    assert tree.parents.tolist() == [-1] * 3
    assert tree.prevalence.tolist() == [0.5] * 3


def test_rows_have_each_finding_as_often_as_it_occurs_whatever_the_heads_biases() -> None:
    tree = fit_tree(released({(0, 1): 250.0}), 4)
    axes = torch.eye(4, 6, dtype=torch.float64)

    def middle(labels: torch.Tensor, uniforms: torch.Tensor, normals: torch.Tensor) -> Middle:
        means = labels.double() @ axes
        return Middle(means, means.new_full((len(means), 1), 0.3), torch.zeros(len(means), dtype=torch.int64))

    head = LinearHead(2.0 * axes, torch.tensor([5.0, -5.0, 0.0, 1.0], dtype=torch.float64))
    law = RowLaw(6, 0, 0, middle, [head], task="multilabel")
    offset = with_offsets(law, score_offsets(law, tree))
    numbers = np.arange(20_000)
    _, labels = RowDrawer(offset, row_key("test", 3), 1).draw(numbers, tree.draw("test", 3, torch.from_numpy(numbers)))
    assert labels.dtype == torch.int8
    # five standard errors of a share of 20,000 rows, and of the 8,192 that the offsets are found with
    assert torch.allclose(labels.double().mean(0), tree.prevalence, atol=0.035)
