"""What every method publishes after a small run under test noise is what the record says (`tests.digests`)."""

from __future__ import annotations

import json

import pytest

from tests.digests import RECORD, names, numbers

RECORDED = json.loads(RECORD.read_text())


def test_record_has_every_method() -> None:
    assert set(RECORDED) == set(names())


@pytest.mark.parametrize("name", names())
def test_method_publishes_what_the_record_says(name: str) -> None:
    found = numbers(name)
    del found["digest"]
    assert found.keys() == RECORDED[name].keys()
    for tensor, values in found.items():
        assert values == pytest.approx(RECORDED[name][tensor], rel=1e-6, abs=1e-6 * max(values[1], 1.0)), tensor
