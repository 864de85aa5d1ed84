"""Measures between two sets that rest on nearest neighbours: coverage of a manifold, and signs of copying.

Both read real records without noise: compute them where the records are, and leave the results there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import DataError


@dataclass(frozen=True)
class ManifoldScores:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class NeighbourWarning:
    """How much nearer synthetic rows are to training records than to held-out ones.

    `share_nearer` is the share of synthetic rows whose nearest record was trained on (0.5 by chance);
    `copies` rows equal a training record. `warning` is a sign to look at, never a proof in either
    direction.
    """

    share_nearer: float
    copies: int
    warning: bool


def manifold_scores(real: Tensor, synthetic: Tensor, neighbours: int = 5, chunk: int = 1024) -> ManifoldScores:
    """Precision, recall, density and coverage from balls around rows, out to their k-th nearest neighbour.

    Args:
        real: (n, d), n > neighbours.
        synthetic: (m, d), m > neighbours.
        neighbours: k.
        chunk: at most chunk x max(n, m) distances are held.

    Returns:
        Precision, recall and coverage in [0, 1]; density at least 0, about 1 for equal laws.

    Source: Kynkäänniemi et al. 2019, eqs. 1-2; Naeem et al. 2020, eqs. 4-5.

    Departs: balls are closed, so that a set of repeated rows lies within itself.
    """
    check_sets(real, synthetic, neighbours + 1)
    real, synthetic = real.double(), synthetic.double()
    real_radius = _neighbour_radius(real, neighbours, chunk)
    synthetic_radius = _neighbour_radius(synthetic, neighbours, chunk)
    in_real_balls = torch.zeros(len(synthetic), dtype=torch.int64)
    recalled, covered = 0, 0
    for start, distance in _distances(real, synthetic, chunk):
        within_real = distance <= real_radius[start : start + len(distance), None]
        in_real_balls += within_real.sum(0)
        covered += int(within_real.any(1).sum())
        recalled += int((distance <= synthetic_radius).any(1).sum())
    return ManifoldScores(
        precision=float((in_real_balls > 0).double().mean()),
        recall=recalled / len(real),
        density=float(in_real_balls.double().mean()) / neighbours,
        coverage=covered / len(real),
    )


def nearest_neighbour_warning(
    synthetic: Tensor, train: Tensor, held_out: Tensor, generator: torch.Generator, chunk: int = 1024
) -> NeighbourWarning:
    """Does the synthetic set lie nearer to the records it was trained on than to others of the same law?

    Train and held-out rows are cut to equal counts. A warning means that the share is above one half by
    four standard errors, counting both the synthetic rows and the records, or that a row is a copy. No
    warning proves nothing: the guarantee is the accountant's.

    Args:
        synthetic: (m, d).
        train: (n, d), records the generator saw.
        held_out: (h, d), records of the same law that it did not see.
        generator: draws the rows to keep.
        chunk: at most chunk x min(n, h) distances are held.
    """
    check_sets(train, synthetic, 1)
    check_sets(held_out, synthetic, 1)
    count = min(len(train), len(held_out))
    seen, unseen = (side[torch.randperm(len(side), generator=generator)[:count]].double() for side in (train, held_out))
    to_seen = torch.cat([block.amin(1) for _, block in _distances(synthetic.double(), seen, chunk)])
    to_unseen = torch.cat([block.amin(1) for _, block in _distances(synthetic.double(), unseen, chunk)])
    # A row as near to the one as to the other counts half: sets of repeated rows raise no alarm.
    nearer = (to_seen < to_unseen).double() + 0.5 * (to_seen == to_unseen).double()
    share = float(nearer.mean())
    scale = float(seen.square().sum(1).mean().sqrt())
    margin = 4 * (0.25 / len(synthetic) + 0.25 / count) ** 0.5
    copies = int((to_seen <= 1e-6 * scale).sum())
    return NeighbourWarning(share, copies, copies > 0 or share > 0.5 + margin)


def _distances(left: Tensor, right: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """First row and Euclidean distances of each block of `left` to all of `right`."""
    for start in range(0, len(left), chunk):
        yield start, torch.cdist(left[start : start + chunk], right)


def _neighbour_radius(rows: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, (n,)."""
    radii = []
    for start, distance in _distances(rows, rows, chunk):
        own = torch.arange(len(distance))
        distance[own, own + start] = torch.inf
        radii.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def check_sets(real: Tensor, synthetic: Tensor, fewest: int) -> None:
    if real.ndim != 2 or synthetic.ndim != 2 or real.shape[1] != synthetic.shape[1]:
        raise DataError(
            f"expected two sets (n, d) and (m, d) of one width, found {tuple(real.shape)} and {tuple(synthetic.shape)}"
        )
    if min(len(real), len(synthetic)) < fewest:
        raise DataError(f"expected at least {fewest} rows in each set, found {len(real)} and {len(synthetic)}")
    if not (bool(torch.isfinite(real).all()) and bool(torch.isfinite(synthetic).all())):
        raise DataError("expected finite embeddings, found NaN or infinity: check the sets before comparing them")
