"""Measures between two sets that rest on nearest neighbours: coverage of a manifold, and signs of copying.

Both read real records without noise: compute them where the records are, and leave the results there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import DataError

_DEALS, _AT_ONCE = 20_000, 500
_RARE = 5e-4  # of both signs together, so that one of some thousand pages warns for nothing


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

    `share_nearer` is the share of synthetic rows whose nearest record was trained on (0.5 by chance), `chance` how
    often a random choice of the trained records would show as much by either sign (see `nearest_neighbour_warning`).
    `copies` rows equal a training record. `warning` is a sign to look at, never a proof in either direction.
    """

    share_nearer: float
    copies: int
    chance: float
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
    synthetic: Tensor,
    train: Tensor,
    held_out: Tensor,
    generator: torch.Generator,
    *,
    groups: Sequence[Tensor] | None = None,
    chunk: int = 1024,
) -> NeighbourWarning:
    """Does the synthetic set lie nearer to the records it was trained on than to others of the same law?

    Train and held-out records are cut to equal counts. If none was looked at, it is chance which of them are called
    trained: so the names are dealt out 20,000 times, to whole patients where they are known, and two signs are
    held against what comes out then. One is the share of synthetic rows nearer to a trained record; a few records in
    the middle of a cloud are nearest to most rows, so it moves far by chance, which a margin for independent rows would
    not know. The other, in which every record has its say, is how near the nearest synthetic row is to each (the mean
    logarithm of the distance): a few blurred copies show there. No warning proves nothing: the guarantee is the
    accountant's.

    Args:
        synthetic: (m, d).
        train: (n, d), records the generator saw.
        held_out: (h, d), records of the same law that it did not see.
        generator: draws the rows to keep, and the deals.
        groups: (n,) and (h,) patient of each record, where known; where one is on both sides, the split was of records,
            and records are dealt out.
        chunk: at most chunk x (n + h) distances are held.

    Returns:
        The signs; a warning where either is in the upper 1 in 4,000 of its deals, or a row is a copy.

    Source: a permutation test (Fisher 1935); distance to the closest record as a sign of membership: Hayes et al. 2019.
    """
    check_sets(train, synthetic, 1)
    check_sets(held_out, synthetic, 1)
    count = min(len(train), len(held_out))
    chosen = [torch.randperm(len(side), generator=generator)[:count] for side in (train, held_out)]
    records = torch.cat([side[rows] for side, rows in zip((train, held_out), chosen, strict=True)]).double()
    patients = torch.arange(2 * count)
    if groups is not None:
        named = torch.cat([side[rows] for side, rows in zip(groups, chosen, strict=True)])
        named = torch.unique(named, return_inverse=True)[1]
        apart = not bool(torch.isin(named[:count], named[count:]).any())
        patients = named if apart else patients
    mass, copies, distance = _nearest(synthetic.double(), records, count, chunk)
    scale = float(records.square().sum(1).mean().sqrt())
    signs = torch.stack([mass, -torch.log(distance.clamp_min(max(1e-6 * scale, 1e-300)))])
    signs = signs - signs.mean(1, keepdim=True)
    chance = min(1.0, 2 * min(_chances(signs, patients, count, generator)))
    return NeighbourWarning(float(mass[:count].sum()), copies, chance, copies > 0 or chance < _RARE)


def _nearest(synthetic: Tensor, records: Tensor, count: int, chunk: int) -> tuple[Tensor, int, Tensor]:
    """Share of the synthetic rows that each record is nearest to, copies, and each record's nearest distance.

    A row as near to a trained record as to another counts half for each: sets of repeated rows raise no alarm.
    """
    mass, copies = torch.zeros(len(records), dtype=torch.float64), 0
    nearest_row = torch.full((len(records),), torch.inf, dtype=torch.float64)
    scale = float(records[:count].square().sum(1).mean().sqrt())
    for _, distance in _distances(synthetic, records, chunk):
        seen, unseen = distance[:, :count].min(1), distance[:, count:].min(1)
        weight = (seen.values < unseen.values).double() + 0.5 * (seen.values == unseen.values).double()
        mass.index_add_(0, seen.indices, weight)
        mass.index_add_(0, unseen.indices + count, 1.0 - weight)
        copies += int((seen.values <= 1e-6 * scale).sum())
        nearest_row = torch.minimum(nearest_row, distance.amin(0))
    return mass / len(synthetic), copies, nearest_row


def _chances(signs: Tensor, patients: Tensor, count: int, generator: torch.Generator) -> list[float]:
    """For each sign, (s, 2 count) and centred, how often a deal of the patients gives the first `count` as much."""
    trained = torch.zeros(int(patients.max()) + 1, dtype=torch.float64)
    trained[patients[:count]] = 1.0
    sums = torch.zeros(len(signs), len(trained), dtype=torch.float64).index_add_(1, patients, signs)
    found, least = torch.zeros(len(signs)), sums @ trained - 1e-12
    for _ in range(_DEALS // _AT_ONCE):
        keys = torch.rand(_AT_ONCE, len(trained), generator=generator)
        dealt = keys <= keys.kthvalue(int(trained.sum()), dim=1, keepdim=True).values
        found += (sums @ dealt.double().T >= least[:, None]).sum(1)
    return ((found + 1) / (_DEALS + 1)).tolist()


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
