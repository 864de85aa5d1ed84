"""The allow-list of tensors: exactly the ones of the run, or nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.errors import WireError
from common.wire.allow_list import check_tensors, num_bytes

SHAPES = {"gradient": (2, 3), "bias": (3,)}
RIGHT = {"gradient": torch.ones(2, 3), "bias": torch.zeros(3)}
WRONG: dict[str, dict[str, Tensor]] = {
    "one more": {**RIGHT, "code": torch.zeros(2)},
    "one less": {"bias": RIGHT["bias"]},
    "another name": {"gradient": RIGHT["gradient"], "code": RIGHT["bias"]},
    "another shape": {**RIGHT, "gradient": torch.ones(3, 2)},
    "another type": {**RIGHT, "bias": torch.zeros(3, dtype=torch.float64)},
    "not a number": {**RIGHT, "bias": torch.tensor([0.0, math.nan, 0.0])},
    "infinite": {**RIGHT, "bias": torch.tensor([0.0, math.inf, 0.0])},
}


@pytest.mark.parametrize("kind", ["statistics", "train"])
def test_check_tensors_lets_exactly_the_allowed_ones_pass(kind: str) -> None:
    check_tensors(kind, RIGHT, SHAPES)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", WRONG)
def test_check_tensors_refuses_all_others_and_quotes_no_value(case: str) -> None:
    with pytest.raises(WireError) as caught:
        check_tensors("train", WRONG[case], SHAPES)
    assert "nan" not in str(caught.value)
    assert "inf" not in str(caught.value)


def test_bytes_are_those_of_float32() -> None:
    assert num_bytes(SHAPES) == sum(value.nbytes for value in RIGHT.values())
    assert num_bytes({}) == 0
