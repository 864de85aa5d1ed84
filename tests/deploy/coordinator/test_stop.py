"""Stopping a run: asked of Flower, and written into the run's status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigError, FederationError
from deploy.coordinator import run
from deploy.coordinator.folder import ServerFolder
from deploy.coordinator.run import in_own_folder, stop_run
from deploy.machine.live import find_status
from deploy.settings import run_config

RUNS = [{"run-id": "17", "status": "running"}, {"run-id": "3", "status": "finished:failed"}]
GOING = json.dumps({"success": True, "runs": RUNS})


def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str) -> ServerFolder:
    """A server whose Flower answers so, and notes what it is asked."""
    flwr = tmp_path / "flwr"
    (tmp_path / "listed").write_text(listed)
    (tmp_path / "done").write_text('{"success": true}')
    answer = f'cat {tmp_path}/$([ "$1" = ls ] && echo listed || echo done)'
    flwr.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{answer}\n')
    flwr.chmod(0o755)
    monkeypatch.setattr(run, "tool", lambda name: str(flwr))
    (tmp_path / "server.toml").write_text('name = "study"\n')
    output = tmp_path / "work" / "outputs" / "run"
    output.mkdir(parents=True)
    (output / "status.json").write_text(json.dumps({"status": "running", "run": "run-17", "round": 3}))
    (output / "checkpoint.safetensors").write_bytes(b"of round 3")
    return ServerFolder(tmp_path)


def test_stopped_run_says_so_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = server(tmp_path, monkeypatch, GOING)
    assert stop_run(place) == "17"
    assert "stop 17 federation" in (tmp_path / "asked").read_text()
    status = find_status(place.work)
    assert (status.state, status.line, status.values["round"]) == ("failed", "stopped by the coordinator", 3)
    assert in_own_folder(place, run_config(["resume=true"])).operation.output_dir == "outputs/run"


def test_nothing_to_stop_and_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = server(tmp_path, monkeypatch, '{"success": true, "runs": []}')
    with pytest.raises(ConfigError, match="no run is going on"):
        stop_run(place)
    (tmp_path / "flwr").write_text("#!/bin/sh\necho unreachable >&2\nexit 1\n")
    with pytest.raises(FederationError, match="is it started"):
        stop_run(place)
    assert find_status(place.work).state == "running"
