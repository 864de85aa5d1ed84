"""Each run of a server has a folder of its own, chosen before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config.presets import resolve
from common.config.run import Scalar
from common.errors import ConfigError
from deploy.coordinator.folder import ServerFolder
from deploy.coordinator.run import in_own_folder, start_run


def server_with(tmp_path: Path, **runs: str) -> ServerFolder:
    """A server with runs in these states, by the name of their folders."""
    for name, state in runs.items():
        folder = tmp_path / "work" / "outputs" / name.replace("_", "-")
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"status": state}))
    return ServerFolder(tmp_path)


def chosen(server: ServerFolder, **settings: Scalar) -> str:
    config = resolve({name.replace("_", "-"): value for name, value in settings.items()})
    return in_own_folder(server, config).operation.output_dir


def test_each_run_takes_the_next_folder(tmp_path: Path) -> None:
    assert chosen(server_with(tmp_path)) == "outputs/run"
    assert chosen(server_with(tmp_path, run="completed")) == "outputs/run-2"
    assert chosen(server_with(tmp_path, run_2="failed")) == "outputs/run-3"
    assert chosen(server_with(tmp_path), output_dir="outputs/mine") == "outputs/mine"


def test_resume_goes_on_with_the_newest_run_that_is_not_complete(tmp_path: Path) -> None:
    server = server_with(tmp_path, run="failed", run_2="failed", run_3="completed")
    assert chosen(server, resume=True) == "outputs/run-2"
    with pytest.raises(ConfigError, match="is complete"):
        chosen(server, resume=True, output_dir="outputs/run-3")


@pytest.mark.parametrize("state", ["completed", "running", "waiting"])
def test_a_named_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path: Path, state: str) -> None:
    server = server_with(tmp_path, mine=state)
    with pytest.raises(ConfigError, match="name a new folder"):
        chosen(server, output_dir="outputs/mine")
    (tmp_path / "server.toml").write_text('name = "study"\n')
    with pytest.raises(ConfigError, match="name a new folder"):
        start_run(server, Path(__file__).resolve().parents[3], resolve({"output-dir": "outputs/mine"}))
    status = tmp_path / "work" / "outputs" / "mine" / "status.json"
    assert json.loads(status.read_text()) == {"status": state}
