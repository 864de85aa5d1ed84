"""How near a synthetic set comes to a site's own records, class by class, and which records it misses.

All of it reads records without noise: the results stay at the site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.evaluation.fidelity import FidelityConfig, chunked_mmd2, two_sample_accuracy
from common.evaluation.neighbours import ManifoldScores, manifold_scores
from common.evaluation.scores import Split
from embeddings.quality.page import Grid

_CONFIG = FidelityConfig(max_rows=1000)
_FEWEST = 4
NEIGHBOURS = 5


@dataclass(frozen=True)
class ClassFidelity:
    """One class: rows compared, and measures; None where there are too few rows.

    `synthetic` and `own` are held against the same held-out records, with equally many rows: `own` are the site's
    training records, so they show what a perfect set would reach. `told_apart` is the share of rows that a network
    tells rightly to be real or synthetic (0.5: it can't). `middle` is the cosine between where the class lies in the
    synthetic set and where it lies in the held-out records, both seen from the middle of all classes.
    """

    held_out: int
    compared: int
    synthetic: ManifoldScores | None
    own: ManifoldScores | None
    mmd2: float | None
    told_apart: float | None
    middle: float | None
    own_middle: float | None


def fidelity_by_class(
    train: Split, held_out: Split, synthetic: Split, num_classes: int, generator: torch.Generator
) -> list[ClassFidelity]:
    """Compare synthetic rows and training rows with held-out records, class by class.

    Args:
        train: the site's records that the generator saw.
        held_out: those that it did not see.
        synthetic: the published set.
        num_classes: K.
        generator: draws the rows and the test's network.
    """
    found = []
    middles = [_middles(side, num_classes) for side in (held_out, synthetic, train)]
    for label in range(num_classes):
        real_middle, made_middle, own_middle = (middle[label] for middle in middles)
        sides = [rows[labels == label] for rows, labels in (train, held_out, synthetic)]
        sides = [rows[torch.randperm(len(rows), generator=generator)][: _CONFIG.max_rows] for rows in sides]
        own, real, made = sides
        count = min(len(own), len(made))
        enough = min(count, len(real)) > _CONFIG.neighbours
        both = torch.cat([own, real])
        enough_rows = min(len(both), len(made)) >= 2 * _FEWEST
        found.append(
            ClassFidelity(
                len(real),
                count,
                manifold_scores(real, made[:count], _CONFIG.neighbours) if enough else None,
                manifold_scores(real, own[:count], _CONFIG.neighbours) if enough else None,
                chunked_mmd2(real, made[:count], _CONFIG.bandwidths) if enough else None,
                two_sample_accuracy(both, made, generator, _CONFIG.two_sample) if enough_rows else None,
                _cosine(real_middle, made_middle),
                _cosine(real_middle, own_middle),
            )
        )
    return found


def _middles(side: Split, num_classes: int) -> list[Tensor | None]:
    """Mean of each class, from the mean of all classes' means; None for a class without rows."""
    rows, labels = side
    means = [rows[labels == label].mean(0) if bool((labels == label).any()) else None for label in range(num_classes)]
    known = [mean for mean in means if mean is not None]
    if not known:
        return means
    middle = torch.stack(known).mean(0)
    return [None if mean is None else mean - middle for mean in means]


def _part(scores: ManifoldScores | None, name: str) -> float | None:
    return None if scores is None else float(getattr(scores, name))


def _cosine(left: Tensor | None, right: Tensor | None) -> float | None:
    if left is None or right is None:
        return None
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))


def fidelity_grid(names: Sequence[str], found: Sequence[ClassFidelity]) -> Grid:
    """The measures as a table: of the synthetic rows, and after the stroke of the site's own training records."""

    def pair(made: float | None, own: float | None, digits: int, factor: float) -> str:
        if made is None or own is None:
            return "too few"
        return f"{factor * made:.{digits}f} / {factor * own:.{digits}f}"

    rows = []
    for name, one in zip(names, found, strict=True):
        made, own = one.synthetic, one.own
        cells = (
            pair(one.middle, one.own_middle, 2, 1.0),
            pair(_part(made, "coverage"), _part(own, "coverage"), 0, 100.0),
            pair(_part(made, "precision"), _part(own, "precision"), 0, 100.0),
            "too few" if one.told_apart is None else f"{100 * one.told_apart:.0f}",
            "too few" if one.mmd2 is None else f"{one.mmd2:.3f}",
        )
        rows.append((name, str(one.held_out), str(one.compared), *cells))
    columns = ("class", "held out", "compared", "direction", "covered, %", "realistic, %", "told apart, %", "MMD²")
    return Grid(columns, tuple(rows), (False, *[True] * 7))


@dataclass(frozen=True)
class Neighbours:
    """A record and the synthetic rows nearest to it.

    Attributes:
        row: of the record in the site's set. label: its class.
        near: classes of the nearest synthetic rows, nearest first.
        distance: to the nearest of them. own_distance: to the nearest other record of the site.
    """

    row: int
    label: int
    near: tuple[int, ...]
    distance: float
    own_distance: float

    def words(self, names: Sequence[str]) -> str:
        """The classes of the neighbours: `liver ×4, spleen`."""
        counted = Counter(self.near).most_common()
        return ", ".join(names[label] + (f" ×{count}" if count > 1 else "") for label, count in counted)


def nearest_synthetic(rows: Tensor, own: Split, synthetic: Split) -> list[Neighbours]:
    """For some records, the synthetic rows nearest to them.

    Args:
        rows: (m,) which records.
        own: all of the site's records. synthetic: the published set.
    """
    distances = torch.cdist(own[0][rows], synthetic[0])
    nearest = distances.topk(min(NEIGHBOURS, len(synthetic[1])), largest=False)
    to_own = torch.cdist(own[0][rows], own[0])
    to_own[torch.arange(len(rows)), rows] = torch.inf
    return [
        Neighbours(
            int(row),
            int(own[1][row]),
            tuple(synthetic[1][nearest.indices[place]].tolist()),
            float(nearest.values[place, 0]),
            float(to_own[place].min()),
        )
        for place, row in enumerate(rows)
    ]


def telling_rows(own: Split, held_out: Tensor, synthetic: Split, num_classes: int, extremes: int = 5) -> list[int]:
    """Held-out records worth looking at: a middling one of each class, then those that the set covers worst.

    Args:
        own: all of the site's records. held_out: (h,) which of them the generator did not see.
        synthetic: the published set.
        num_classes: K.
        extremes: how many of the worst.
    """
    if len(held_out) == 0:
        return []
    distance = torch.cdist(own[0][held_out], synthetic[0]).amin(1)
    chosen = []
    for label in range(num_classes):
        places = torch.nonzero(own[1][held_out] == label)[:, 0]
        if len(places) > 0:
            order = places[distance[places].argsort()]
            chosen.append(int(held_out[order[len(order) // 2]]))
    worst = [int(held_out[place]) for place in distance.argsort(descending=True)]
    return chosen + [row for row in worst if row not in chosen][:extremes]
