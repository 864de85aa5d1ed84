"""Which classes rows should have, and from which codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.methods.base import Artifact
from common.methods.published import interleaved_labels, wanted_counts, with_code

CODES = Artifact(
    "generator",
    {"meta.codes": torch.arange(6.0).reshape(3, 2), "meta.weights": torch.tensor([0.5, 0.3, 0.2]), "w": torch.ones(1)},
    {},
)


def test_wanted_counts_by_hand() -> None:
    """7 rows by 1:1:2 are 1.75, 1.75, 3.5: the two largest remainders get the two rows that are left."""
    assert wanted_counts(7, [1, 1, 2]) == [2, 2, 3]
    assert wanted_counts(10, [1, 0]) == [10, 0]
    assert wanted_counts(2, [1, 1, 1]) == [1, 1, 0]


@settings(max_examples=60)
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


@settings(max_examples=40)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=8).filter(lambda each: sum(each) > 0))
def test_interleaved_labels_hold_every_class_as_often_as_asked(counts: list[int]) -> None:
    labels = interleaved_labels(counts, torch.arange(sum(counts)))
    assert torch.bincount(labels, minlength=len(counts)).tolist() == counts


def test_interleaved_labels_are_mixed_in_every_stretch() -> None:
    """In any 100 rows of two equal classes, both are there about 50 times."""
    labels = interleaved_labels([5000, 5000], torch.arange(10_000)).reshape(100, 100)
    assert 45 <= int(labels.sum(1).min()) <= int(labels.sum(1).max()) <= 55


def test_interleaved_labels_of_parts_are_those_of_the_whole() -> None:
    whole = interleaved_labels([30, 11, 60], torch.arange(101))
    some = torch.tensor([0, 7, 8, 50, 100])
    assert torch.equal(interleaved_labels([30, 11, 60], some), whole[some])


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
