"""Sets of rows: nothing depends on threads, on pieces, or on how far one reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.generator import row_sets
from common.generator.row_law import Middle, RowLaw
from common.generator.row_sets import RowSet, piece_rows
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.methods.published import published_set


def middle(labels: Tensor, uniform: Tensor, normal: Tensor) -> Middle:
    """Around the label, by three latents."""
    del uniform
    return Middle(labels[:, None] + normal, torch.zeros(len(labels), 1).double(), torch.zeros_like(labels))


def make(total: int, key: int = 3) -> RowSet:
    return RowSet(RowLaw(3, 0, 3, middle, noisy=False), key, total, lambda numbers: numbers % 5, 1)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sets, "_PIECE_VALUES", 24)
    monkeypatch.setattr(row_sets, "_BLOCK_VALUES", 100)


def test_piece_rows_depend_on_the_width_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert piece_rows(768) == 1024
    assert piece_rows(1024) == 1024
    assert piece_rows(1025) == 512
    assert piece_rows(2) == 4096
    assert piece_rows(2**22) == 1


def test_blocks_are_the_same_for_any_number_of_threads_and_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    one, labels = make(1000).all(threads=1)
    many, _ = make(1000).all(threads=4)
    assert torch.equal(one, many)
    assert torch.equal(labels, torch.arange(1000) % 5)
    assert len(torch.unique(one)) > 2900
    assert torch.equal(make(1000).some(np.arange(1000))[0], one)
    monkeypatch.setattr(row_sets, "_PIECE_VALUES", 2**14)
    assert torch.equal(make(1000).all()[0], one)


def test_blocks_hold_whole_pieces_and_come_in_order() -> None:
    sizes = [len(labels) for _, labels in make(100).blocks()]
    assert sizes == [32, 32, 32, 4]
    assert make(100).block_rows == 32


def test_row_depends_on_neither_the_total_nor_how_far_one_reads() -> None:
    few, many = next(make(40).blocks())[0], next(make(999).blocks())[0]
    assert torch.equal(few, many)
    assert not torch.equal(few, next(make(40, key=4).blocks())[0])


def test_blocks_leave_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    stream = make(1000).blocks()
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before


def test_published_set_is_a_function_of_generator_settings_and_seed() -> None:
    found = {}
    for seed in (0, 1):
        config = RunConfig.from_flat({"method": "dp_gauss", "num-rounds": 0, "seed": seed})
        method = get_method("dp_gauss")
        context = RunContext(config.replace(synthetic_rows=50), Problem(4, ("a", "b"), 2), method.plan(config))
        made = [published_set(context, method.finish(context, method.init(context))) for _ in range(2)]
        assert made[0] is not None
        assert made[1] is not None
        assert torch.equal(made[0].all()[0], made[1].all()[0])
        assert made[0].tries == 1
        found[seed] = made[0].all()[0]
    assert not torch.equal(found[0], found[1])
    head = get_method("dp_fedsgd")
    config = RunConfig().replace(method="dp_fedsgd")
    context = RunContext(config, Problem(4, ("a", "b"), 2), head.plan(config))
    assert published_set(context, head.finish(context, head.init(context))) is None
