"""A few hundred changed files at each run of the tests; `make fuzz` feeds 10,000."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("pydicom")
from tests.fuzz.files import fuzz_files


def test_500_changed_files_cost_no_good_one() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    session = fuzz_files(500, seed)
    assert session.inputs >= 500
    assert session.refused > 100
    assert session.read > 100
    assert {"changed bytes", "odd header", "archive, odd rows"} <= set(session.counts)


def test_same_seed_gives_the_same_files() -> None:
    assert fuzz_files(60, 1).counts == fuzz_files(60, 1).counts
