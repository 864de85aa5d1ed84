"""The performance scripts at their smallest, and what is kept of their results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import performance, server, step_cost, whole
from benchmarks.flame import draw_flame, own_times, sample_stack
from benchmarks.floor_app import write_app
from benchmarks.message_cost import answer, declare, make_messages, make_sites
from benchmarks.performance_pictures import draw_pictures
from benchmarks.records import RESULTS
from benchmarks.step_ways import build_ways
from client_app.ledger.ledger import Ledger
from common.methods import get_method


@pytest.mark.parametrize("decoder", ["small", "paper-sized"])
def test_ways_of_a_step_run(decoder: str) -> None:
    """Every way gives a gradient of each of its parameters."""
    ways = build_ways(8, 16, decoder).ways
    ours = ways["private"]()
    assert isinstance(ours, dict)
    assert all(bool(torch.isfinite(value).all()) for value in ours.values())
    assert len(ours) == len(list(ways["plain"]()))  # type: ignore[call-overload]
    assert len(list(ways["vmap"]())) == len(list(ways["opacus hooks"]()))  # type: ignore[call-overload]
    ways["opacus ghost"]()


def test_step_cost_reports_every_way() -> None:
    found = step_cost.measure(8, 16, "small", 0.01)
    others = {"opacus ghost", "opacus hooks", "vmap", "noise alone"}
    assert set(found["ways"]) == {"plain", "private", "private with noise"} | others
    assert found["ways"]["plain"]["memory_to_plain"] == 1.0


def test_loop_and_server_costs_are_of_whole_rounds() -> None:
    rows = server.loop_costs((2, 4), site_rounds=4, repeats=1)
    assert [row["sites"] for row in rows] == [2, 4]
    assert all(row["milliseconds_per_site_round"] > 0 for row in rows)


def test_whole_run_without_privacy_clips_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop beside which the private one is timed calls neither clipping nor noise."""
    monkeypatch.setattr(whole, "SITES", 2)
    monkeypatch.setattr(whole, "RECORDS", 20)
    called: list[str] = []
    monkeypatch.setattr("common.privacy.mechanism.add_gaussian", lambda tensors, *_: called.append("noise") or tensors)
    assert whole.seconds_of_rounds(1, private=False) > 0
    assert not called
    whole.seconds_of_rounds(1, private=True)
    assert len(called) == 2 * 2 * whole.EPOCHS


def test_message_is_answered_by_a_real_site(tmp_path: Path) -> None:
    sites = make_sites(tmp_path, 1)
    statistics, train = make_messages(tmp_path)
    declare(statistics, sites)
    client_step = get_method("fedhypevae").client_step
    parts = answer("ours", train, sites[0])
    assert {"imports", "handler", "handler: client step", "handler: ledger", "whole"} <= set(parts)
    # what was timed is itself again
    assert isinstance(vars(Ledger)["open"], classmethod)
    assert get_method("fedhypevae").client_step is client_step


def test_floor_app_is_an_app_that_flower_packs(tmp_path: Path) -> None:
    from deploy.machine.app_contents import read_files
    from deploy.machine.app_package import build_package

    names = read_files(build_package(write_app(tmp_path / "floor", {"a": (2, 3)}, {"b": (4,)})))
    assert {"floor/client.py", "floor/server.py"} <= set(names)
    compile(names["floor/client.py"], "client", "exec")
    compile(names["floor/server.py"], "server", "exec")


def test_flame_graph_shows_where_time_goes(tmp_path: Path) -> None:
    pytest.importorskip("pyinstrument")
    size = torch.rand(200, 200)

    def work() -> None:
        for _ in range(200):
            torch.linalg.svd(size)

    root = sample_stack(work)
    draw_flame(root, tmp_path / "flame.png", "test")
    assert (tmp_path / "flame.png").stat().st_size > 1000
    most = own_times(root)[0]
    assert "svd" in most["function"]
    assert most["share"] > 0.8


def test_parts_without_a_result_say_so(tmp_path: Path) -> None:
    for part in performance.PARTS:
        (row,) = performance.collect(part, "", tmp_path)
        assert not row["met"]
        assert row["reason"]
    draw_pictures(tmp_path)


def test_part_without_time_left_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(performance.PARTS, "step", ("step_cost", ["timeit", "-n", "1", "-s", "pass"], 420, list))
    assert performance.measure("step", 60.0) == ""
    assert "no time" in performance.measure("step", 5.0)


def test_performance_results_stand_beside_their_goals() -> None:
    path = RESULTS / "performance.json"
    if not path.is_file():
        pytest.skip("no results/performance.json: run make bench-performance")
    rows = json.loads(path.read_text())
    for row in rows:
        assert set(row) >= {"name", "value", "goal", "unit", "met"}
        assert row["met"] or row["reason"]
