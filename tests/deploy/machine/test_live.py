"""Watching a federation from outside: by the run's status file, and by a site's own ledger."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from client_app.ledger import upkeep
from common.errors import DataError
from deploy.machine import live
from deploy.machine.live import (
    find_status,
    new_lines,
    refusals_in,
    site_line,
    status_rows,
    watch_refusals,
    watch_run,
    watch_site,
)
from tests.deploy.report_cases import command
from tests.deploy.site.warm.warm_cases import wait
from tests.harness import Federation

RUNNING: dict[str, Any] = {
    "status": "running",
    "run": "run-7",
    "method": "fedhypevae",
    "rounds": 5,
    "round": 2,
    "sites": 3,
    "sites_answered": 2,
    "missing": {"st-anna": "did not answer in time"},
    "epsilon_spent": 1.25,
    "epsilon_target": 3.0,
    "delta": 1e-5,
    "seconds": 61.0,
    "seconds_left": 3700.0,
    "line": "round   2/5   sites 2/3",
}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({**RUNNING, **changes}))
    return folder


def test_status_tells_round_sites_epsilon_and_time(tmp_path: Path) -> None:
    rows = dict(status_rows(find_status(write(tmp_path))))
    assert rows["state"] == "running"
    assert rows["round"] == "2 of 5"
    assert rows["sites"] == "2 of 3 answered in the last round"
    assert rows["missing"] == "st-anna: did not answer in time"
    assert rows["epsilon"] == "1.25 of 3 spent at most, at delta 1e-05"
    assert rows["time"] == "1 min 01 s so far, about 1 h 01 min left"
    assert rows["last line"] == "round 2/5 sites 2/3"


def test_status_finds_the_newest_run_of_a_server_or_a_home(tmp_path: Path) -> None:
    old = write(tmp_path / "work" / "outputs" / "first", run="old")
    new = write(tmp_path / "work" / "outputs" / "deep" / "second", run="new")
    os.utime(old / "status.json", (1, 1))
    assert find_status(tmp_path).folder == new
    assert find_status(tmp_path / "work" / "outputs").values["run"] == "old"  # the folders right below
    with pytest.raises(DataError, match="no run at"):
        find_status(tmp_path / "work" / "outputs" / "none")


def test_status_of_a_run_that_stopped_talking_is_silent(tmp_path: Path) -> None:
    file = write(tmp_path) / "status.json"
    before = time.time() - 3600
    os.utime(file, (before, before))
    assert find_status(tmp_path).state == "silent"
    write(tmp_path, status="completed")
    os.utime(file, (before, before))
    assert find_status(tmp_path).state == "completed"


def test_status_command_exits_by_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("status", write(tmp_path / "a")) == 0
    assert "2 of 5" in capsys.readouterr().out
    assert command("status", write(tmp_path / "b", status="failed", error="too few sites"), "--watch") == 1
    assert "too few sites" in capsys.readouterr().out
    assert command("status", tmp_path / "a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["epsilon_spent"] == 1.25
    (tmp_path / "c").mkdir()
    assert command("status", tmp_path / "c") == 2
    (tmp_path / "c" / "status.json").write_text("[]")
    assert command("status", tmp_path / "c") == 2


def test_new_lines_are_told_once_and_old_ones_never(tmp_path: Path) -> None:
    lines = new_lines(lambda: find_status(tmp_path))
    assert next(lines) is None
    write(tmp_path, line="one")
    assert [next(lines), next(lines)] == ["one", None]
    write(tmp_path, line="two")
    assert next(lines) == "two"
    write(tmp_path, status="failed", error="too few sites")
    assert next(lines) == "failed: too few sites"
    assert next(new_lines(lambda: find_status(tmp_path))) is None


def test_watchers_tell_of_rounds_and_of_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "POLL_S", 0.02)
    federation = Federation.create(tmp_path, num_sites=2, data_is_public=True, metrics_may_leave=True)
    folder, stop = federation.sites[0].folder, threading.Event()
    assert site_line(folder) == ""
    run_lines: list[str] = []
    site_lines: list[str] = []
    threads = [
        watch_run(lambda: find_status(federation.output), stop, run_lines.append),
        watch_site(folder, stop, site_lines.append),
    ]
    federation.run(num_rounds=2, run_name="study")
    wait(lambda: any("round 2 sent" in line for line in site_lines) and any("2/2" in line for line in run_lines))
    time.sleep(0.3)  # scores of public data are released too: no line of their own
    stop.set()
    for thread in threads:
        thread.join()
    assert any("round   2/2   sites 2/2" in line for line in run_lines)
    with federation.sites[0].ledger() as ledger:
        epsilon = upkeep.spent(ledger, 1e-5).runs[0].epsilon
    assert f"study: round 2 sent; epsilon {epsilon:.2f} of 3.2 for a run" in site_lines[-1]
    assert site_line(folder) in site_lines[-1]
    told = [line.split(" ", 1)[1] for line in site_lines]
    assert len(told) == len(set(told))


def test_a_site_tells_its_refusals_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run that it refuses writes them into its log; of a library's error the reference alone."""
    monkeypatch.setattr(live, "POLL_S", 0.02)
    federation = Federation.create(tmp_path, 1)
    site, stop = federation.sites[0], threading.Event()
    site.set_policy(max_clip_norm=0.01)
    shown: list[str] = []
    thread = watch_refusals(site.folder, stop, shown.append)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not shown:
        time.sleep(0.02)
    stop.set()
    thread.join()
    assert "policy rule max_clip_norm allows 0.01" in shown[0]
    (line,) = refusals_in(site.log())
    assert shown[0].endswith(line)
    failed = "2026-01-01T00:00:00+00:00 reference 0123abcd\nTraceback\nValueError: row 17 is \x1b[2J\n\n"
    assert refusals_in(failed) == ["refused (reference 0123abcd in site.log): it failed: its whole error is there"]
