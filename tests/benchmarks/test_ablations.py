"""Ablations: every variant is a valid configuration, a small one runs, and what is kept and rendered is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations
from benchmarks.reference import local_heads
from common.errors import ConfigError
from tests.benchmarks.small_federation import small_federation


def _record(variant: str, seed: int, balanced: float) -> dict[str, Any]:
    pair = [balanced, balanced]
    return {"variant": variant, "seed": seed, "settings": ablations.settings_of(variant), "synthetic_only": pair,
            "mixed": pair, "own_lambda": pair, "personalised": pair, "knn": balanced, "mmd2": 0.01, "recall": None,
            "coverage": 0.5, "two_sample": 0.9, "seconds": 1.0}  # fmt: skip


@pytest.mark.parametrize("variant", ablations.VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_changes_what_it_names_and_nothing_else(variant: ablations.Variant) -> None:
    expected = {} if variant.name in {"code-2", "latent-4"} else variant.changes  # the table's row has these parts
    assert ablations.changed(variant.name) == expected


def test_names_are_told_apart_and_unknown_ones_refused(tmp_path: Path) -> None:
    names = [variant.name for variant in ablations.VARIANTS]
    assert len({*names, ablations.BASE}) == len(names) + 1
    assert {variant.whose for variant in ablations.VARIANTS} == {"paper", "ours"}
    with pytest.raises(ConfigError, match="unknown variant"):
        ablations.changed("no-luck")
    assert ablations.main(["--only", "no-luck", "--out", str(tmp_path / "a.json")]) == 2


def test_a_small_variant_gives_a_whole_record(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = small_federation()
    small = replace(ablations.base_row(), settings={**ablations.base_row().settings, "num-rounds": 2})
    small = replace(small, settings={**small.settings, "synthetic-rows": 90})
    monkeypatch.setattr(ablations, "base_row", lambda: small)
    monkeypatch.setattr(ablations, "federation_of", lambda seed: (federation, local_heads(federation)))
    ablations._flat.cache_clear()
    try:
        record = ablations.measure("plain-rows", 7)
    finally:
        ablations._flat.cache_clear()
    assert set(record) == set(_record(ablations.BASE, 7, 0.5))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["settings"]["prototypes"] is False


def test_records_of_other_settings_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "ablations.json", list[tuple[str, int]]()
    stale = {**_record("plain-rows", 1, 0.6), "settings": {"prototypes": False}}
    path.write_text(json.dumps([_record(ablations.BASE, 1, 0.7), stale]), encoding="utf-8")

    def all_at_once(function: object, tasks: list[tuple[str, int]], workers: int, keep: Any) -> None:
        for task in tasks:
            asked.append(task)
            keep(_record(*task, 0.5))

    monkeypatch.setattr(ablations, "run_all", all_at_once)
    arguments = ["--only", "plain-rows", "--seeds", "1", "2", "--out", str(path)]
    assert ablations.main(arguments) == 0
    assert asked == [("plain-rows", 1), (ablations.BASE, 2), ("plain-rows", 2)]
    assert ablations.main(arguments) == 0
    assert len(asked) == 3


def test_differences_are_taken_within_a_seed() -> None:
    records = [_record(ablations.BASE, 1, 0.8), _record(ablations.BASE, 2, 0.6),
               _record("plain-rows", 1, 0.7), _record("plain-rows", 2, 0.5)]  # fmt: skip
    (line,) = [line for line in ablations.render(records).splitlines() if line.startswith("| plain-rows")]
    assert "| 60.0/60.0 (14.1) | -10.0 (0.0) |" in line
