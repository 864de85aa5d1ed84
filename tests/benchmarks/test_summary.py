"""The short comparison in README.md comes from the kept records, and from nowhere else."""

from __future__ import annotations

import pytest

from benchmarks.summary import BEGIN, END, README, comparison, with_comparison
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


def test_comparison_goes_between_the_marks_alone() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert with_comparison(text, []) == f"before\n{BEGIN}\n\n{END}\nafter"
    with pytest.raises(ConfigError, match="found not both"):
        with_comparison("no marks", [])


def test_readme_shows_the_kept_records() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_comparison(text, load_records(RESULTS / "table.json")) == text
