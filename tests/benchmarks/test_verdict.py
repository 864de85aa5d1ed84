"""The verdict is worked out from records: it names where FedHypeVAE is behind, and counts what is within the spread."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.render import render
from benchmarks.table import RESULTS
from benchmarks.verdict import Standing, architecture_gains, architecture_lines, standings, verdict_lines


def _scores(*sites: float) -> dict[str, Any]:
    mean = sum(sites) / len(sites)
    per_site = {"accuracy": list(sites), "balanced_accuracy": list(sites)}
    return {"accuracy": mean, "balanced_accuracy": mean, "per_site": per_site}


def _record(method: str, trust: str, seed: int, score: float, near: float | None = None) -> dict[str, Any]:
    fidelity = heads = None
    if near is not None:
        fidelity = {"mmd2": near, "precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": score, "two_sample": 0.4}
        heads = {name: {"accuracy": score, "balanced_accuracy": score} for name in ("linear", "knn", "mlp")}
    return {
        "dataset": "organ-iid", "method": method, "trust": trust, "epsilon": 1.0, "seed": seed, "heads": heads,
        "synthetic_only": _scores(score), "mixed": _scores(score), "own_lambda": None, "personalised": _scores(score),
        "fidelity": fidelity, "bytes_up": 1, "bytes_down": 1, "released_parameters": 1, "seconds": 1.0,
    }  # fmt: skip


def _records(ours: tuple[float, float], rival: tuple[float, float]) -> list[dict[str, Any]]:
    pairs = (("fedhypevae_tied", ours, 0.02), ("dp_gauss", rival, 0.01))
    return [
        _record(method, "local", seed, score, near)
        for method, scores, near in pairs
        for seed, score in enumerate(scores)
    ]


def _found(records: list[dict[str, Any]], column: str) -> Standing:
    (one,) = [standing for standing in standings(records) if standing.column == column]
    return one


@pytest.mark.parametrize(
    ("ours", "verdict"), [((0.90, 0.90), "ahead"), ((0.70, 0.70), "behind"), ((0.79, 0.83), "level")]
)
def test_verdict_counts_a_lead_only_beyond_the_spread_over_seeds(ours: tuple[float, float], verdict: str) -> None:
    assert _found(_records(ours, (0.8, 0.8)), "mixed balanced_accuracy").verdict == verdict


def test_a_smaller_distance_is_the_better_one_and_chance_is_the_best_two_sample_test() -> None:
    records = _records((0.9, 0.9), (0.8, 0.8))
    assert _found(records, "mmd2").verdict == "behind"
    assert _found(records, "mmd2").lead == pytest.approx(-0.01)
    assert _found(records, "two_sample").lead == 0
    dense = [{**one, "fidelity": {**one["fidelity"], "density": 4.0}} for one in records]
    assert _found([*records[:2], *dense[2:]], "density").lead == pytest.approx(3.0)


def test_every_measure_of_a_set_is_compared() -> None:
    (record, *_) = _records((0.9, 0.9), (0.8, 0.8))
    assert set(record["fidelity"]) <= {one.column for one in standings(_records((0.9, 0.9), (0.8, 0.8)))}


def test_only_rows_of_one_trust_are_compared() -> None:
    records = [*_records((0.9, 0.9), (0.8, 0.8)), _record("dp_fedsgd", "secagg", 0, 0.99)]
    assert {one.trust for one in standings(records)} == {"local"}
    assert _found(records, "mixed accuracy").rival == "dp_gauss"


def test_the_better_of_our_rows_meets_the_best_rival() -> None:
    records = [*_records((0.9, 0.9), (0.8, 0.8)), _record("fedhypevae", "local", 0, 0.95),
               _record("dp_fedsgd", "local", 0, 0.85)]  # fmt: skip
    one = _found(records, "personalised accuracy")
    assert (one.ours, one.rival) == ("fedhypevae", "dp_fedsgd")
    assert one.lead == pytest.approx(10.0)


def test_report_names_what_is_behind_and_where_sharing_gains_nothing() -> None:
    records = [*_records((0.7, 0.7), (0.8, 0.8)), _record("local_only", "none", 0, 0.75)]
    text = "\n".join(verdict_lines(records))
    assert "- organ-iid, local, synthetic-only BACC: dp_gauss 80.0, fedhypevae_tied 70.0" in text
    assert "taking part gains nothing: personalised fedhypevae_tied 70.0, a site's own head 75.0 BACC" in text
    assert text in render(records)
    assert "gains nothing" not in "\n".join(verdict_lines(_records((0.9, 0.9), (0.8, 0.8))))
    assert verdict_lines([_record("local_only", "none", 0, 0.75)]) == []


def test_architectures_are_those_of_the_sites_in_turn() -> None:
    alone, shared = _record("local_only", "none", 3, 0.5), _record("mh_pfedhn", "none", 3, 0.5)
    alone["personalised"] = _scores(0.5, 0.6, 0.7, 0.8, 0.7)
    shared["personalised"] = _scores(0.7, 0.5, 0.7, 0.8, 0.9)
    lines = architecture_lines([alone, shared])
    assert "| organ-iid | mh_pfedhn | linear | 80.0/80.0 | 60.0/60.0 | +20.0/+20.0 | 1 |" in lines
    assert "| organ-iid | mh_pfedhn | mlp-16 | 50.0/50.0 | 60.0/60.0 | -10.0/-10.0 | 1 |" in lines
    assert architecture_lines([shared]) == []


@pytest.mark.parametrize("method", ["mh_pfedhn", "mh_pfedhn_gd"])
def test_kept_table_beats_own_heads_on_skewed_sites_for_every_architecture(method: str) -> None:
    """The comparison's bar, on the committed records: BACC at Dirichlet(0.3) sites, on average over three seeds."""
    records = json.loads((RESULTS / "table.json").read_text(encoding="utf-8"))
    gains = [one for one in architecture_gains(records) if (one.dataset, one.method) == ("organ-dir0.3", method)]
    assert {one.architecture for one in gains} == {"linear", "mlp-16", "mlp-32", "mlp-32-16"}
    for one in gains:
        assert one.seeds == 3
        assert one.personal[1] > one.alone[1], one.architecture
