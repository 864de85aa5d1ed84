"""Rows without limit: counts, order, seeds; nothing depends on threads or on how far one reads."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.bundle_sampling import interleaved_labels, piece_rows, stream_blocks, wanted_counts, with_code
from common.errors import ConfigError
from common.methods.base import Artifact, seeded

CODES = Artifact(
    "generator",
    {"meta.codes": torch.arange(6.0).reshape(3, 2), "meta.weights": torch.tensor([0.5, 0.3, 0.2]), "w": torch.ones(1)},
    {},
)


def draw(wanted: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A stand-in for a method's sampler: noise around the label."""
    return wanted[:, None] + torch.randn(len(wanted), 3, generator=seeded("test", seed)), wanted


def test_wanted_counts_by_hand() -> None:
    """7 rows by 1:1:2 are 1.75, 1.75, 3.5: the two largest remainders get the two rows that are left."""
    assert wanted_counts(7, [1, 1, 2]) == [2, 2, 3]
    assert wanted_counts(10, [1, 0]) == [10, 0]
    assert wanted_counts(2, [1, 1, 1]) == [1, 1, 0]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(lambda each: sum(each) > 1e-3))
def test_wanted_counts_add_up_and_stay_near_their_share(rows: int, weights: list[float]) -> None:
    counts = wanted_counts(rows, weights)
    assert sum(counts) == rows
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - rows * weight / sum(weights)) < 1.0 + 1e-6


@pytest.mark.parametrize(("rows", "weights"), [(0, [1.0]), (5, []), (5, [0.0]), (5, [-1.0, 2.0]), (5, [float("nan")])])
def test_wanted_counts_refuses_what_is_no_share(rows: int, weights: list[float]) -> None:
    with pytest.raises(ConfigError):
        wanted_counts(rows, weights)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=8).filter(lambda each: sum(each) > 0))
def test_interleaved_labels_hold_every_class_as_often_as_asked(counts: list[int]) -> None:
    labels = interleaved_labels(counts, 0, sum(counts))
    assert torch.bincount(labels, minlength=len(counts)).tolist() == counts


def test_interleaved_labels_are_mixed_in_every_stretch() -> None:
    """In any 100 rows of two equal classes, both are there about 50 times."""
    labels = interleaved_labels([5000, 5000], 0, 10_000).reshape(100, 100)
    assert 45 <= int(labels.sum(1).min()) <= int(labels.sum(1).max()) <= 55


def test_interleaved_labels_of_parts_are_those_of_the_whole() -> None:
    whole = interleaved_labels([30, 11, 60], 0, 101)
    parts = [interleaved_labels([30, 11, 60], at, min(at + 7, 101)) for at in range(0, 101, 7)]
    assert torch.equal(torch.cat(parts), whole)


def test_piece_rows_depend_on_the_width_alone() -> None:
    assert piece_rows(768) == 1024
    assert piece_rows(1024) == 1024
    assert piece_rows(1025) == 512
    assert piece_rows(2) == 4096
    assert piece_rows(2**22) == 1


def test_stream_blocks_is_the_same_for_any_number_of_threads() -> None:
    def collect(threads: int) -> tuple[Tensor, Tensor]:
        parts = list(stream_blocks(draw, lambda a, b: torch.arange(a, b) % 5, 1000, 8, 3, threads))
        return torch.cat([values for values, _ in parts]), torch.cat([labels for _, labels in parts])

    (one, labels), (many, _) = collect(1), collect(4)
    assert torch.equal(one, many)
    assert torch.equal(labels, torch.arange(1000) % 5)
    assert len(torch.unique(one)) > 2900  # no two pieces share a stream


def test_stream_blocks_begins_alike_however_far_one_reads() -> None:
    """A piece depends on its place and the seed alone."""
    few = next(stream_blocks(draw, lambda a, b: torch.zeros(b - a, dtype=torch.int64), 128, 8, 3))[0]
    many = next(iter(islice(stream_blocks(draw, lambda a, b: torch.zeros(b - a, dtype=torch.int64), 999, 8, 3), 1)))[0]
    assert torch.equal(few, many)
    other = next(stream_blocks(draw, lambda a, b: torch.zeros(b - a, dtype=torch.int64), 128, 8, 4))[0]
    assert not torch.equal(few, other)


def test_stream_blocks_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    stream = stream_blocks(draw, lambda a, b: torch.zeros(b - a, dtype=torch.int64), 1000, 8, 3)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before


def test_with_code_takes_one_code_of_a_mixture() -> None:
    assert with_code(CODES, None) is CODES
    assert with_code(CODES, "mixture") is CODES
    for code in (1, "1"):
        chosen = with_code(CODES, code)
        assert chosen.tensors["meta.codes"].tolist() == [[2.0, 3.0]]
        assert chosen.tensors["meta.weights"].tolist() == [1.0]
        assert "w" in chosen.tensors


@pytest.mark.parametrize("code", ["meta", 3, "-1", "first", "1.0"])
def test_with_code_refuses_a_code_that_is_not_there(code: int | str) -> None:
    with pytest.raises(ConfigError):
        with_code(CODES, code)


def test_with_code_refuses_any_code_of_a_generator_without_codes() -> None:
    plain = Artifact("generator", {"w": torch.ones(1)}, {})
    assert with_code(plain, None) is plain
    with pytest.raises(ConfigError, match="has no codes"):
        with_code(plain, "meta")
