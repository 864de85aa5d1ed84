"""The table: a cell on a tiny federation, what is left to do, what is kept, and what is rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cells, table
from benchmarks.protocol import Federation
from benchmarks.reference import local_heads
from benchmarks.render import render, score_cell
from benchmarks.rows import ROWS, TABLE_DATASETS, Row
from common.errors import ConfigError, DataError
from common.methods import method_names
from tests.benchmarks.small_federation import small_federation

_FIELDS = {
    "dataset", "method", "trust", "epsilon", "seed", "synthetic_only", "mixed", "own_lambda", "personalised", "heads",
    "fidelity", "bytes_up", "bytes_down", "released_parameters", "seconds",
}  # fmt: skip


def _small(row: Row) -> Row:
    small = {"num-rounds": 2, "synthetic-rows": 90, "cvae-width": 6, "gan-width": 4, "noise-dim": 3, "chunk-size": 40}
    return Row(row.method, row.trust, {**row.settings, **small}, row.registered, row.head_scale)


def _use(monkeypatch: pytest.MonkeyPatch, *federations: Federation) -> None:
    monkeypatch.setattr(cells, "federations_of", lambda dataset, seed: federations)
    monkeypatch.setattr(cells, "local_heads_of", lambda dataset, seed: [local_heads(one) for one in federations])


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method}-{row.trust}")
def test_every_row_gives_a_whole_record(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, small_federation())
    record = cells.run_cell("organ-iid", _small(row), 7)
    assert set(record) == _FIELDS
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    private = row.trust != "none"
    assert (record["epsilon"] is not None) == private
    if private:
        assert 0.95 < record["epsilon"] <= 1.0
    for name in ("synthetic_only", "mixed", "own_lambda", "personalised"):
        if record[name] is not None:
            per_site = record[name]["per_site"]
            assert record[name]["accuracy"] == pytest.approx(sum(per_site["accuracy"]) / 3)
            assert all(0 <= value <= 1 for values in per_site.values() for value in values)
    if row.registered is not None:
        assert record["bytes_up"] > 0
        assert record["released_parameters"] > 0


@pytest.mark.slow
def test_a_cell_comes_out_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, small_federation())
    row = _small(next(row for row in ROWS if row.method == "dp_fedsgd"))
    first, second = (cells.run_cell("organ-iid", row, 7) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_folds_give_one_value_a_site_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, small_federation("x"), small_federation("y"), small_federation("z"))
    record = cells.run_cell("ham-loso", _small(next(row for row in ROWS if row.method == "fedavg")), 7)
    assert len(record["mixed"]["per_site"]["accuracy"]) == 3


def test_measures_of_folds_are_their_means_and_none_stays_none() -> None:
    first, second = {"a": {"b": 1.0}, "c": None}, {"a": {"b": 2.0}, "c": 3.0}
    assert cells.mean_of([first, second]) == {"a": {"b": 1.5}, "c": None}
    assert cells.mean_of([None, second]) is None


def test_the_head_of_a_synthetic_set_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, small_federation())
    row = _small(next(row for row in ROWS if row.method == "dp_cvae"))
    federation = cells.federations_of("organ-iid", 7)[0]
    trained = cells.train(federation, row)
    assert trained.fitted is trained.head
    assert trained.fitted is not None
    record = cells.run_cell("organ-iid", row, 7)
    tests = [(site.test.embeddings, site.test.labels) for site in federation.sites]
    rows, labels = (torch.cat(parts) for parts in zip(*tests, strict=True))
    assert record["heads"]["linear"]["accuracy"] == pytest.approx(
        float((trained.fitted.logits(rows).argmax(1) == labels).double().mean())
    )


def test_bytes_of_a_site_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedAvg, two rounds, d = 8, K = 3: counts and sum once, then weight, bias and n_i up, the centre down too."""
    _use(monkeypatch, small_federation())
    record = cells.run_cell("organ-iid", _small(next(row for row in ROWS if row.method == "fedavg")), 7)
    assert record["bytes_up"] == 4 * (3 + 8 + 2 * (24 + 3 + 1))
    assert record["bytes_down"] == 4 * 2 * (24 + 3 + 8)
    assert record["released_parameters"] == 24 + 3


def test_secagg_rows_assume_a_dropout_and_a_colluder_where_sites_allow() -> None:
    row = next(row for row in ROWS if row.trust == "secagg")
    for sites, shares in ((3, 2), (10, 8)):
        config = row.config(small_federation(num_sites=sites))
        assert config.privacy.trust == "secagg"
        assert config.privacy.assumptions(sites).honest_shares == shares


def test_rows_cover_every_method_of_the_issue_and_are_told_apart() -> None:
    assert {row.registered for row in ROWS} - {None} <= set(method_names())
    assert {"fedavg", "fedprox", "fedlambda", "dp_fedsgd", "dp_cgan", "dp_cvae", "dp_gauss", "fedhypevae", "mh_pfedhn",
            "mh_pfedhn_gd", "local_only", "centralised"} <= {row.method for row in ROWS}  # fmt: skip
    assert len({(row.method, row.trust) for row in ROWS}) == len(ROWS)


def test_open_tasks_leaves_out_what_is_there_and_refuses_unknown_names() -> None:
    done = [{"dataset": "ham", "method": "dp_gauss", "trust": "local", "seed": 1}]
    tasks = table.open_tasks(done, ["ham"], ["dp_gauss"], [1, 2])
    assert [(seed, row.trust) for _, seed, row in tasks] == [(1, "secagg"), (2, "local"), (2, "secagg")]
    assert len(table.open_tasks([], list(TABLE_DATASETS), [], [1, 2, 3])) == 5 * 3 * len(ROWS)
    with pytest.raises(ConfigError, match="unknown 'mnist'"):
        table.open_tasks([], ["mnist"], [], [1])


def test_records_are_kept_whole_and_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results" / "table.json"
    assert table.load_records(path) == []
    table.write_text(path, json.dumps([{"seed": 1}]))
    assert table.load_records(path) == [{"seed": 1}]
    assert [one.name for one in path.parent.iterdir()] == ["table.json"]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="--fresh"):
        table.load_records(path)


def test_command_refuses_an_unknown_method_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--methods", "nothing", "--out", str(tmp_path / "table.json")]) == 2
    assert "unknown 'nothing'" in capsys.readouterr().err


def _score(accuracy: list[float]) -> dict[str, Any]:
    mean = sum(accuracy) / len(accuracy)
    per_site = {"accuracy": accuracy, "balanced_accuracy": [value - 0.1 for value in accuracy]}
    return {"accuracy": mean, "balanced_accuracy": mean - 0.1, "per_site": per_site}


def test_score_cell_tells_the_spread_over_seeds_from_that_over_sites() -> None:
    # Means 0.8 and 0.9: their deviation is 7.07 points. Within a seed the sites lie 0.2 apart: 14.1 points.
    records = [{"mixed": _score([0.7, 0.9])}, {"mixed": _score([0.8, 1.0])}]
    assert score_cell(records, "mixed") == "85.0/75.0 (7.1/7.1 seeds, 14.1/14.1 sites)"
    assert score_cell([{"mixed": None}], "mixed") == "-"


def test_render_gives_each_data_set_its_table() -> None:
    scores = dict.fromkeys(("synthetic_only", "mixed", "own_lambda", "personalised"), _score([0.7, 0.9]))
    plain = {
        "dataset": "ham",
        "method": "fedavg",
        "trust": "none",
        "epsilon": None,
        "seed": 1,
        **scores,
        "heads": None,
        "fidelity": None,
        "bytes_up": 2_500,
        "bytes_down": 0,
        "released_parameters": 5643,
        "seconds": 2.0,
    }
    heads = {name: {"accuracy": 0.8, "balanced_accuracy": 0.75} for name in ("linear", "knn", "mlp")}
    near = {"mmd2": 0.0034, "precision": None, "recall": 0.5, "density": 0.1, "coverage": 0.2, "two_sample": 0.9}
    private = {**plain, "method": "dp_gauss", "trust": "local", "epsilon": 0.998, "heads": heads, "fidelity": near}
    text = render([plain, private])
    assert text.count("### ham") == 1
    assert "| fedavg | none | ∞ | 80.0/70.0 (0.0/0.0 seeds, 14.1/14.1 sites) |" in text
    assert "| 2.5 kB | 0 | 5,643 | 2 | 1 |" in text
    assert "| dp_gauss | local | 1.00 |" in text
    assert "| dp_gauss | local | 80.0/75.0 | 80.0/75.0 | 80.0/75.0 | 0.003 | - | 0.500 |" in text
