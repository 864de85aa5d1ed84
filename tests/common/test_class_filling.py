"""Rows until each class has its number: exact where it can be had, bounded where not, true to the law of a class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.class_filling import fill_classes
from common.methods.base import seeded

Drawn = tuple[Tensor, Tensor]


class Relabelling:
    """A stand-in for a generator that gives a row asked for as class i the class j with probability `law[i, j]`."""

    def __init__(self, law: Tensor) -> None:
        self.law, self.rows = law, 0

    def __call__(self, asked: Tensor, seed: int) -> Drawn:
        generator = seeded("relabelling", seed)
        got = torch.multinomial(self.law[asked], 1, generator=generator)[:, 0]
        self.rows += len(asked)
        # the second coordinate tells the rows apart
        return torch.stack([got.float(), torch.rand(len(asked), generator=generator)], 1), got


def filled(draw: Callable[[Tensor, int], Drawn], wanted: Tensor) -> Drawn:
    first = [draw(part, 1000 + index) for index, part in enumerate(wanted.split(64))]
    return fill_classes(draw, wanted, first, 64, lambda number: number)


UNEVEN = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]])


def test_classes_have_the_numbers_that_were_asked_for() -> None:
    """As drawn, the easy class has 73 of 100 rows; filled, every place has its class, and rows are whole and new."""
    draw, wanted = Relabelling(UNEVEN), torch.arange(900) % 3
    as_drawn = draw(wanted, 1)[1].bincount(minlength=3)
    assert int(as_drawn[0]) > 600 > 100 > int(as_drawn[2])
    values, labels = filled(draw, wanted)
    assert torch.equal(labels, wanted)
    assert torch.equal(values[:, 0].long(), wanted)
    assert len(values[:, 1].unique()) == len(values)
    assert draw.rows < 2 * 900 + 8 * 900


def test_rows_that_need_nothing_are_left_as_they_are() -> None:
    draw, wanted = Relabelling(torch.eye(3)), torch.tensor([2, 0, 1, 1])
    before = draw(wanted, 1000)
    draw.rows = 0
    values, labels = filled(draw, wanted)
    assert draw.rows == 4
    assert torch.equal(values, before[0])
    assert torch.equal(labels, before[1])


def test_class_that_can_not_be_had_stays_short_within_a_bounded_number_of_draws() -> None:
    draw = Relabelling(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    values, labels = filled(draw, torch.arange(2000) % 2)
    assert draw.rows <= 8 * 2000
    assert labels.bincount(minlength=2).tolist() == [2000, 0]
    assert torch.equal(values[:, 0].long(), labels)
    assert len(values[:, 1].unique()) == 2000


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 300))
def test_every_place_is_filled_once(seed: int, classes: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = Relabelling(torch.rand(classes, classes, generator=generator) ** 3 + 1e-3)
    wanted = torch.randint(classes, (rows,), generator=generator)
    values, labels = filled(draw, wanted)
    assert torch.equal(values[:, 0].long(), labels)
    assert len(values[:, 1].unique()) == rows
    again = filled(draw, wanted)
    assert torch.equal(again[0], values)


@pytest.mark.slow
def test_rows_of_a_class_keep_the_law_that_they_have_as_drawn() -> None:
    """Leaving rows out by their label, and nothing else, must not move the rows within a class."""
    draw, wanted = Relabelling(UNEVEN), torch.arange(30_000) % 3
    values, labels = filled(draw, wanted)
    for label in range(3):
        rows = values[labels == label, 1].sort().values
        gap = (rows - torch.linspace(0, 1, len(rows))).abs().max()
        assert float(gap) < 2.2 / len(rows) ** 0.5  # Kolmogorov, at about 1e-4
