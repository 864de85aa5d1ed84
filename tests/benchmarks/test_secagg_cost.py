"""The cost of secure aggregation: a small round of the real protocol, and what was measured against what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.secagg import measure

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "secagg.json"


def test_measure_counts_the_vector_and_what_comes_with_it() -> None:
    row = measure(4, 2000)
    assert (row["dropouts"], row["honest_shares"]) == (1, 2)
    vector = 2000 * int(str(row["bits"])) // 8
    assert vector < int(str(row["bytes_up_site"])) < vector + 4000


def test_results_keep_what_was_asked_of_ten_sites() -> None:
    """At most twice the bytes of trust local, and three seconds of computing: all sites and the server together."""
    if not RESULTS.is_file():
        pytest.skip("no results/secagg.json: run python -m benchmarks.secagg")
    ten = json.loads(RESULTS.read_text())["rounds"][0]
    assert ten["sites"] == 10
    assert ten["bytes_up_over_local"] <= 2.0
    assert 10 * ten["site_seconds_beyond_local"] + ten["server_seconds"] <= 3.0
