"""What can be watched of a run, and that no more than that is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from server_app.progress import Pace, RoundPrinter, RoundRecord, duration
from server_app.tracking import RunWatch, check_tracking
from tests.harness import Federation, HarnessSite, deliver

ALLOWED_TAGS = {"epsilon/limit of the run", "rounds/sites answered", "rounds/seconds", "bytes/received", "bytes/sent"}


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def record(**changes: Any) -> RoundRecord:
    values: dict[str, Any] = {
        "number": 2,
        "rounds": 5,
        "answered": 1,
        "sites": 2,
        "missing": {"b": "unreachable"},
        "epsilon": {"a": 0.5, "b": 0.25},
        "epsilon_target": 3.0,
        "delta": 1e-5,
        "seconds": 1.5,
        "seconds_left": 4.5,
        "bytes_up": 10,
        "bytes_down": 20,
    }
    return RoundRecord(**{**values, **changes})


def test_line_of_a_method_without_a_promise_shows_no_epsilon() -> None:
    assert "epsilon 0.50 of 3" in record().line
    unprotected = record(epsilon={})
    assert "not private" in unprotected.line
    assert "epsilon" not in unprotected.line
    assert unprotected.history()["epsilon"] == {}
    assert "epsilon 0.50 of 3, no guarantee" in record(guaranteed=False).line


def watch(folder: Path, tracking: Any = "off") -> RunWatch:
    return RunWatch(folder, RoundPrinter(), tracking, {"run": "r", "method": "m", "rounds": 5, "sites": 2})


def test_run_keeps_curves_of_what_may_leave_and_nothing_else(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=2)
    summary = federation.run(num_rounds=3)
    found = curves(federation.output / "tensorboard")
    assert set(found) == ALLOWED_TAGS | {"epsilon/site-1", "epsilon/site-2"}
    assert all(sorted(steps) == [1, 2, 3] for steps in found.values())
    spent = summary["privacy"]["epsilon_spent_per_site"]
    assert found["epsilon/site-1"][3] == pytest.approx(spent["site-1"], rel=1e-6)
    assert found["epsilon/site-1"][1] < found["epsilon/site-1"][2] < found["epsilon/site-1"][3]
    assert sum(found["bytes/received"].values()) < sum(len(seen.wire) for seen in federation.sent())
    assert [entry["epsilon"]["site-2"] for entry in summary["history"]] == pytest.approx(
        list(found["epsilon/site-2"].values()), rel=1e-6
    )


def test_status_tells_of_missing_sites_while_the_run_goes_on(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=2)
    seen: list[dict[str, Any]] = []

    def tamper(site: HarnessSite, message: Any, handler: Any) -> Any:
        seen.append(federation.status())
        if site.name == "site-2" and "round-1" in message.metadata.group_id:
            return None
        return deliver(site, message)

    federation.run(tamper=tamper, round_timeout=0.2)
    assert seen[0]["status"] == "waiting"
    second = next(status for status in seen if status.get("round") == 1)
    assert (second["status"], second["sites_answered"], second["sites"]) == ("running", 1, 2)
    assert "in time" in second["missing"]["site-2"]
    assert 0 < second["epsilon_spent"] < second["epsilon_target"]
    last = federation.status()
    assert (last["status"], last["round"], last["rounds"], last["missing"]) == ("completed", 2, 2, {})


def test_resumed_run_goes_on_with_its_history(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=2)

    def down_in_round_two(site: HarnessSite, message: Any, handler: Any) -> Any:
        return None if message.metadata.group_id == "round-2" else deliver(site, message)

    with pytest.raises(SystemExit):
        federation.run(tamper=down_in_round_two, num_rounds=3, round_timeout=0.2)
    failed = federation.status()
    assert (failed["status"], failed["round"]) == ("failed", 1)
    summary = federation.run(num_rounds=3, resume=True, tracking="off", run_id=2)
    assert [entry["round"] for entry in summary["history"]] == [1, 2, 3]


def test_watch_line_and_history_hold_the_numbers_of_the_round() -> None:
    assert record().line == "round   2/5   sites 1/2   epsilon 0.50 of 3   left 4 s"
    assert record(epsilon={"a": float("inf")}).history()["epsilon"] == {"a": None}
    assert duration(65.2) == "1 min 05 s"


def test_pace_tells_the_time_left_from_the_last_ten_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 100.0, *[100.0 + 2.0 * lap for lap in range(1, 12)]])
    monkeypatch.setattr("server_app.progress.time.monotonic", lambda: next(now))
    pace = Pace()
    assert (pace.lap(), pace.left(3)) == (100.0, 300.0)
    assert [pace.lap() for _ in range(11)] == [2.0] * 11
    assert pace.left(3) == 6.0  # the slow first round is forgotten


def test_watch_goes_on_without_curves_when_the_disk_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    watched = watch(tmp_path, "tensorboard")
    watched.round(record(), 3.0)
    watched.round(record(number=3), 4.0)
    watched.close("completed")
    assert capsys.readouterr().out.count("can't keep the curves") == 1
    assert json.loads((tmp_path / "status.json").read_text())["round"] == 3


def test_watch_off_writes_the_status_alone(tmp_path: Path) -> None:
    watched = watch(tmp_path)
    watched.round(record(), 3.0)
    watched.close("completed")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_mlflow_keeps_the_same_curves_in_local_files(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    watched = watch(tmp_path, "mlflow")
    watched.round(record(), 3.0)
    watched.close("completed")
    kept = next((tmp_path / "mlflow").rglob("metrics/epsilon/a"))
    assert kept.read_text().split()[1:] == ["0.5", "2"]
    assert not (tmp_path / "tensorboard").exists()


def test_mlflow_that_is_not_installed_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tracking("tensorboard")
    with pytest.raises(ConfigError, match="not installed"):
        check_tracking("mlflow")


def test_apps_start_imports_no_tracker() -> None:
    code = (
        "import sys, server_app.app, client_app.app;"
        " print([name for name in sys.modules if name.split('.')[0] in ('tensorboard', 'mlflow')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
