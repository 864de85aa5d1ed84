"""Rows drawn until each class has as many as were asked for, where a generator gives its rows other labels.

A generator that relabels rows by its own posterior gives an easy class more rows than were asked of it, and a hard one
fewer. Here a row too many is left out, and a class that is short is asked for again. All of it is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.classifier import Split

_MOST_DRAWS = 8  # rows drawn for each row wanted, at most
_FEW = 4096  # further rows that cost next to nothing: a small set may need more than eight times its own
_LEAST_GAIN = 1 / 32
_SPARE = 1.05  # so that one more round is seldom needed

Draw = Callable[[Tensor, int], Split]


def fill_classes(draw: Draw, wanted: Tensor, first: list[Split], piece: int, seed_of: Callable[[int], int]) -> Split:
    """Put rows of the wanted classes in their places, drawing more while some are missing, within a bound.

    Args:
        draw: (labels asked for (m,), seed) -> embeddings (m, d) and the labels that the rows got (m,).
        wanted: (n,) label of each place.
        first: what `draw` gave for `wanted`, in parts.
        piece: rows drawn at once.
        seed_of: number of a further draw (0, 1, ...) -> its seed.

    Returns:
        embeddings (n, d) and labels (n,): `wanted`, but where a class could not be had in 8 n draws (or n + 4096);
        there, rows of `first` that were left over stand with the labels that they got.
    """
    got = torch.cat([labels for _, labels in first])
    if torch.equal(got, wanted):
        return torch.cat([values for values, _ in first]), wanted
    filling = _Filling(wanted, int(torch.maximum(got.max(), wanted.max())) + 1, first[0][0])
    left_over = [(values, labels, filling.take(values, labels)) for values, labels in first]
    filling.count(wanted, got)
    number, allowed = 0, max((_MOST_DRAWS - 1) * len(wanted), _FEW)
    while allowed > 0 and filling.missing > 0:
        asked = filling.ask(allowed)
        allowed -= len(asked)
        for part in asked.split(piece):
            values, labels = draw(part, seed_of(number))
            filling.take(values, labels)
            filling.count(part, labels)
            number += 1
    if filling.missing:
        filling.use(_unused(left_over))
    return filling.values, filling.labels


def _unused(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Split]:
    for values, labels, used in parts:
        yield values[~used], labels[~used]


class _Filling:
    """Places that fill up, class by class in order."""

    def __init__(self, wanted: Tensor, num_classes: int, like: Tensor) -> None:
        self.labels = wanted.clone()
        self.values = like.new_empty(len(wanted), like.shape[1])
        self._places = [torch.nonzero(wanted == label)[:, 0] for label in range(num_classes)]
        self._asked, self._kept = torch.zeros(num_classes), torch.zeros(num_classes)

    @property
    def missing(self) -> int:
        """Places that are still empty."""
        return sum(len(places) for places in self._places)

    def count(self, asked: Tensor, got: Tensor) -> None:
        """Note how often a class that is asked for is what one gets."""
        classes = len(self._places)
        self._asked += asked.bincount(minlength=classes)
        self._kept += asked[asked == got].bincount(minlength=classes)

    def take(self, values: Tensor, labels: Tensor) -> Tensor:
        """Use the rows that are missing; says of each row whether it was used."""
        used = torch.zeros(len(labels), dtype=torch.bool)
        for label, places in enumerate(self._places):
            if len(places):
                rows = torch.nonzero(labels == label)[: len(places), 0]
                self.values[places[: len(rows)]] = values[rows]
                self._places[label] = places[len(rows) :]
                used[rows] = True
        return used

    def ask(self, most: int) -> Tensor:
        """Labels to ask for, so that about as many rows come as are missing: at most so many labels."""
        asked = []
        for label, places in enumerate(self._places):
            gain = float(self._kept[label] / self._asked[label].clamp_min(1.0))
            asked.append(math.ceil(_SPARE * len(places) / max(gain, _LEAST_GAIN)))
        if sum(asked) > most:
            asked = [math.ceil(count * most / sum(asked)) for count in asked]
        labels = torch.repeat_interleave(torch.arange(len(asked)), torch.tensor(asked))
        return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(len(labels)))][:most]

    def use(self, parts: Iterator[Split]) -> None:
        """Fill what is still empty with any rows, and their own labels."""
        empty = torch.cat(self._places)
        for values, labels in parts:
            now, empty = empty[: len(labels)], empty[len(labels) :]
            self.values[now], self.labels[now] = values[: len(now)], labels[: len(now)]
        self._places = []
