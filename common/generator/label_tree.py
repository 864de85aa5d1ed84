"""Which findings go together: a tree of dependence, fitted to noised counts of pairs, and label vectors drawn from it.

All of it is post-processing of released values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor

from common.generator.layers import Tensors
from common.generator.row_numbers import row_key, row_words, uniforms
from common.privacy.combined import ReleasedStatistics

PARENTS, PRESENT = "labels.parents", "labels.present"
"""Names of a tree's two tensors among what is published."""
_LEAST = 1e-12


@dataclass(frozen=True)
class LabelTree:
    """A law of label vectors: each finding depends on at most one other.

    Attributes:
        parents: (K,) int64, the finding that each depends on; -1 for one that depends on none.
        present: (K, 2) float64, probability of each finding where its parent is absent, and where it is present.
    """

    parents: Tensor
    present: Tensor

    @classmethod
    def of(cls, tensors: Tensors) -> LabelTree | None:
        """The tree among a run's published tensors; None where there is none."""
        if PARENTS not in tensors:
            return None
        return cls(tensors[PARENTS].long(), tensors[PRESENT].double())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tree as float32 tensors, to be published."""
        return {PARENTS: self.parents.float(), PRESENT: self.present.float()}

    @property
    def order(self) -> list[int]:
        """The findings, each after its parent."""
        known, order = {-1}, list[int]()
        while len(order) < len(self.parents):
            ready = [k for k, parent in enumerate(self.parents.tolist()) if parent in known and k not in known]
            order += ready
            known |= set(ready)
        return order

    @property
    def prevalence(self) -> Tensor:
        """Probability of each finding: (K,) float64."""
        share = torch.zeros(len(self.parents), dtype=torch.float64)
        for finding in self.order:
            parent = int(self.parents[finding])
            absent, present = self.present[finding]
            share[finding] = absent if parent < 0 else absent + share[parent] * (present - absent)
        return share

    def draw(self, purpose: str, seed: int, numbers: Tensor) -> Tensor:
        """Label vectors of rows by their ascending numbers, each of purpose, seed and its number alone: (n, K) int8."""
        key = row_key(f"labels/{purpose}", seed)
        drawn = uniforms(row_words(key, numbers.numpy(), len(self.parents), 0))
        labels = torch.zeros(len(numbers), len(self.parents), dtype=torch.int8)
        for finding in self.order:
            parent = int(self.parents[finding])
            given = labels[:, parent].long() if parent >= 0 else torch.zeros(len(numbers), dtype=torch.int64)
            labels[:, finding] = drawn[:, finding] < self.present[finding][given]
        return labels


def fit_tree(statistics: ReleasedStatistics | None, num_findings: int) -> LabelTree:
    """The tree whose law is nearest to what was released: of all trees that of the largest mutual information.

    Args:
        statistics: with prevalence and pair counts; without them each finding is present in half of the rows, and
            depends on no other.
        num_findings: K.

    Returns:
        The tree, or a forest: a covariance that the noise explains is shrunk to 0, and joins nothing.

    Source: Chow and Liu (1968). Departs from it: shrunk by the noise (James & Stein 1961, positive part); where a
        finding is unknown is taken to say nothing of which others are present.
    """
    alone = torch.full((num_findings,), -1)
    if statistics is None or statistics.prevalence is None or statistics.pair_counts is None:
        return LabelTree(alone, torch.full((num_findings, 2), 0.5, dtype=torch.float64))
    share = statistics.prevalence.double()
    both = joint_shares(statistics)
    edges = minimum_spanning_tree(-mutual_information(share, both).numpy())
    parents = _rooted(edges + edges.T, num_findings)
    above = parents.clamp(min=0)
    joint = both[torch.arange(num_findings), above]
    given_present = joint / share[above]
    given_absent = (share - joint) / (1.0 - share[above])
    roots = parents < 0
    present = torch.stack([torch.where(roots, share, given_absent), torch.where(roots, share, given_present)], 1)
    return LabelTree(parents, present.clamp(0.0, 1.0))


def joint_shares(statistics: ReleasedStatistics) -> Tensor:
    """Share of the records with both findings, shrunk towards that of findings without dependence: (K, K) float64."""
    if statistics.prevalence is None or statistics.known_counts is None or statistics.pair_counts is None:
        raise ValueError("expected the statistics of findings, found those of classes")
    share, known = statistics.prevalence.double(), statistics.known_counts.double()
    apart = torch.outer(share, share)
    # of those that know both, if one being unknown says nothing of the other
    pairs_known = (torch.outer(known, known) / statistics.total).clamp(min=1.0)
    covariance = statistics.pair_counts.double() / pairs_known - apart
    noise = statistics.noise_std["pair_counts"] / pairs_known
    # what sampling adds to the noise of the release
    noise = noise.square() + apart * (1.0 - apart) / pairs_known
    kept = (1.0 - noise / covariance.square().clamp(min=_LEAST)).clamp(min=0.0)
    least, most = (share[:, None] + share - 1.0).clamp(min=0.0), torch.minimum(share[:, None], share)
    return torch.minimum(torch.maximum(apart + kept * covariance, least), most)


def mutual_information(share: Tensor, both: Tensor) -> Tensor:
    """Of each pair of findings, in nats, 0 along the diagonal: shares (K,) and joint shares (K, K) -> (K, K)."""
    first, second = share[:, None].expand_as(both), share[None].expand_as(both)
    cells = (
        (both, first * second),
        (first - both, first * (1.0 - second)),
        (second - both, (1.0 - first) * second),
        (1.0 - first - second + both, (1.0 - first) * (1.0 - second)),
    )
    information = torch.stack([p.clamp(min=0.0) * (p.clamp(min=_LEAST) / q.clamp(min=_LEAST)).log() for p, q in cells])
    total = information.sum(0)
    # what rounding leaves of no dependence is no edge
    return torch.where(total > 1e-9, total, 0.0).fill_diagonal_(0.0)


def _rooted(edges: NDArray[np.float64], num_findings: int) -> Tensor:
    """Parents of a forest, each tree of it hung up at its first finding: (K,)."""
    parents = torch.full((num_findings,), -1)
    seen: set[int] = set()
    for root in range(num_findings):
        if root not in seen:
            order, above = breadth_first_order(edges, root, directed=False)
            seen |= {int(node) for node in order}
            for node in order[1:]:
                parents[int(node)] = int(above[node])
    return parents
