"""Free steps for any generator: rows of unit length, what a record holds, and how it is rendered."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import free_steps
from tests.benchmarks.small_federation import small_federation


def test_filled_rows_have_unit_length_and_a_share_stays_bare() -> None:
    rows = 0.6 * torch.nn.functional.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    found = free_steps.filled(rows, torch.Generator().manual_seed(1), 0.25)
    bare = (found == rows).all(1)
    assert float(bare.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert float(found[~bare].square().sum(1).mean()) == pytest.approx(1.0, abs=0.02)
    long = 2.0 * rows / 0.6
    assert torch.equal(free_steps.filled(long, torch.Generator().manual_seed(1)), long)  # nothing is left to fill


@pytest.mark.parametrize(
    ("method", "other"),
    [("fedhypevae", "without prototypes"), ("dp_gauss", "2 % at class means"), ("dp_cvae", "filled to unit length")],
)
def test_each_method_is_judged_twice(method: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = small_federation()
    monkeypatch.setattr(free_steps, "load_federations", lambda *_: (federation,))
    monkeypatch.setattr(free_steps, "data_folder", lambda: None)
    original = free_steps.train
    monkeypatch.setattr(
        free_steps,
        "train",
        lambda one, row, changes: original(one, row, {**changes, "num-rounds": 2, "synthetic-rows": 600}),
    )
    record = free_steps.measure(method, math.inf, 7)
    assert list(record["variants"]) == ["as in the table", other]
    first, second = record["variants"].values()
    assert first != second
    line = f"| inf | {method} | {other} |"
    assert any(one.startswith(line) for one in free_steps.render([record]).splitlines())


def test_means_and_spreads_are_over_seeds() -> None:
    def record(seed: int, knn: float) -> dict[str, Any]:
        found = {"knn": knn, "mmd2": 0.01, "precision": 0.1, "recall": 0.2, "density": 1.0, "coverage": knn}
        return {"method": "dp_gauss", "epsilon": 1.0, "seed": seed, "variants": {"as in the table": found}}

    (line,) = [one for one in free_steps.render([record(1, 0.4), record(2, 0.6)]).splitlines() if "dp_gauss" in one]
    expected = "| 1 | dp_gauss | as in the table | 50.0 (14.1) | 0.0100 | 0.1000 | 0.2000 | 0.500 (0.141) | 2 |"
    assert line == expected
