"""A few hundred changed replies at each run of the tests; `make fuzz` feeds 20,000."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.run import fuzz

KINDS = {"query.hello", "query.statistics", "train", "evaluate"}


def test_500_changed_replies_end_no_run_and_cost_the_honest_sites_nothing() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    session = fuzz(500, seed)
    assert session.mutations >= 500
    assert set(session.counts) > KINDS
    assert session.refused > 250


@pytest.mark.parametrize("seed", [1])
def test_same_seed_gives_the_same_changes(seed: int) -> None:
    assert fuzz(60, seed, secagg=False).counts == fuzz(60, seed, secagg=False).counts
