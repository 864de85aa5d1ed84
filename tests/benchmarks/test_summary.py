"""The computed tables of the pages come from the kept records and the code, and from nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.summary import SECTIONS, comparison, ledger_example, with_section
from benchmarks.table import RESULTS, load_records
from common.errors import ConfigError


def _record(dataset: str, method: str, trust: str, seed: int, accuracy: float) -> dict[str, object]:
    scores = {"accuracy": accuracy, "balanced_accuracy": accuracy / 2}
    names = ("synthetic_only", "mixed", "personalised")
    return {
        "dataset": dataset,
        "method": method,
        "trust": trust,
        "seed": seed,
        "heads": {"knn": scores},
        **dict.fromkeys(names, scores),
    }


def test_comparison_gives_means_over_seeds() -> None:
    records = [_record("organ-iid", "dp_cvae", "local", seed, 0.5 + 0.1 * seed) for seed in (0, 1)]
    records.append({**_record("ham", "dp_cvae", "local", 0, 0.2), "heads": None})
    even, other = comparison(records).split("\n\n")
    assert even.splitlines()[2] == "| `dp_cvae` | local | 55.0/27.5 | 55.0/27.5 | 55.0/27.5 | 55.0/27.5 |"
    assert other.splitlines()[2] == "| `dp_cvae` | local | - | - | - | 20.0/10.0 | - |"


def test_section_goes_between_its_marks_alone() -> None:
    begin, end = "<!-- some: written by benchmarks/summary.py -->", "<!-- end of the some -->"
    assert with_section(f"before\n{begin}\nold\n{end}\nafter", "some", "new") == (
        f"before\n{begin}\n\nnew\n\n{end}\nafter"
    )
    with pytest.raises(ConfigError, match="found not both"):
        with_section("no marks", "some", "new")


@pytest.mark.parametrize(("page", "name", "table"), SECTIONS, ids=[name for _, name, _ in SECTIONS])
def test_pages_show_what_is_computed(page: Path, name: str, table: Callable[[list[dict[str, Any]]], str]) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_section(text, name, table(load_records(RESULTS / "table.json"))) == text


def test_ledger_example_ends_with_the_run_that_does_not_fit() -> None:
    rows = [line.split("|")[1:-1] for line in ledger_example().splitlines()[2:]]
    assert [row[-1].strip() for row in rows] == ["charged"] * (len(rows) - 1) + ["refused"]
    assert float(rows[-2][2]) <= 3.0 < float(rows[-1][2])
