"""Every method runs under the Strategy and the handlers, three rounds, by its name alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from common.methods import get_method, method_names
from common.publishing.parquet import read_notes
from server_app.checkpoint import load_checkpoint
from tests.harness import Federation

ONE_SHOT = {"dp_gauss"}  # its one release is the whole method
WAYS = {"local_only", "synthetic_only", "mixed"}


@pytest.mark.parametrize("name", method_names())
def test_method_runs_over_the_strategy(tmp_path: Path, name: str) -> None:
    federation = Federation.create(
        tmp_path, num_sites=2, allowed_methods=method_names(), data_is_public=True, metrics_may_leave=True
    )
    summary = federation.run(method=name, num_rounds=3, sampling_rate=1.0)
    assert summary["status"] == "completed"
    assert summary["method"] == name
    rounds = 0 if name in ONE_SHOT else 3
    assert summary["rounds"] == rounds
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]] * rounds
    private = get_method(name).private
    assert summary["privacy"]["end_to_end"] is private
    statistics = load_checkpoint(federation.output)[0].statistics
    has_means = statistics is not None and statistics.class_means is not None
    assert ("statistics_only" in summary["scores"]) is has_means
    assert "local_only" in summary["scores"]
    assert all(0.0 <= scores["accuracy"] <= 1.0 for scores in summary["scores"].values())
    with safe_open(federation.output / "generator.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["private"]) is private
    if get_method(name).law is not None:
        notes = read_notes(federation.output / "synthetic.parquet")
        assert notes["private"] is private
        assert bool(notes["not_private_because"]) is not private
    check_promised_fields(summary, sites=2)
    for site in federation.sites:
        runs = site.runs()
        assert bool(runs) is private  # what is not private is never charged as if it were
        if private:
            assert math.isfinite(summary["privacy"]["epsilon_spent_per_site"][site.name])
            assert summary["privacy"]["epsilon_spent_per_site"][site.name] <= 3.0


def check_promised_fields(summary: dict[str, Any], sites: int) -> None:
    """What others read from summary.json, with its types."""
    kinds = {"status": str, "method": str, "sites": int, "rounds": int, "synthetic_rows": int}
    kinds |= {"seconds": float, "bytes_up_per_site": int, "bytes_down_per_site": int}
    assert {name: type(summary[name]) for name in kinds} == kinds
    assert summary["sites"] == sites
    assert summary["bytes_up_per_site"] > 0
    privacy = summary["privacy"]
    kinds = {"epsilon_target": float, "delta": float, "unit": str, "neighbouring": str, "accountant": str}
    kinds |= {"encoder_training": str, "end_to_end": bool, "epsilon_spent_per_site": dict, "data_is_public": bool}
    assert {name: type(privacy[name]) for name in kinds} == kinds
    if summary["method"] == "fedhypevae":
        assert set(summary["scores"]) >= WAYS
        assert summary["synthetic_rows"] == 60
    for scores in summary["scores"].values():
        assert set(scores["per_site"]) == {f"site-{number + 1}" for number in range(sites)}
        for name in ("accuracy", "balanced_accuracy"):
            mean = sum(of_site[name] for of_site in scores["per_site"].values()) / sites
            assert 0.0 <= scores[name] <= 1.0
            assert scores[name] == pytest.approx(mean, abs=1e-6)
