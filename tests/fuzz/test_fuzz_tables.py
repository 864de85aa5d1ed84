"""A few hundred saved texts at each run of the tests; `make fuzz` reads 10,000."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("pydicom")  # the changes are those of the pictures' own fuzz
from tests.fuzz.tables import fuzz_tables


def test_500_saved_texts_are_read_right_or_refused_in_one_line() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    session = fuzz_tables(500, seed)
    assert session.inputs >= 500
    assert session.refused > 100
    assert session.read > 100
    assert set(session.counts) == {"study.toml", "site.toml", "policy.toml", "peers.json", "classes.txt", "names"}


def test_same_seed_gives_the_same_texts() -> None:
    first, second = fuzz_tables(60, 1), fuzz_tables(60, 1)
    assert (first.refused, first.read) == (second.refused, second.read)
