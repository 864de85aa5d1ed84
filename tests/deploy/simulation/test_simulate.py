"""A simulation's SuperLink is its own: what another run left or does is not its concern, and nothing of it stays."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, FedHypeVAEError
from common.texts import object_in
from deploy.machine.environment import tool
from deploy.simulation import superlink
from deploy.simulation.demonstration import alone_in
from deploy.simulation.superlink import own_superlink


def listed(environment: dict[str, str], folder: Path) -> dict[str, object]:
    """What `flwr ls local` answers."""
    command = [tool("flwr"), "ls", "local", "--format", "json"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    return object_in(done.stdout)


def group_of(pid: int) -> list[str]:
    """The programs of a process group that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            name, rest = path.read_text().rsplit(")", 1)
            if rest.split()[2] == str(pid) and rest.split()[0] != "Z":
                found.append(name)
    return found


def test_two_at_once_are_two_and_a_broken_database_of_flowers_own_harms_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".flwr" / "local-superlink"
    left.mkdir(parents=True)
    (left / "state.db").write_bytes(b"half a migration")  # as a start that was cut off leaves it
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / ".flwr"))
    started: list[int] = []
    real = subprocess.Popen

    def note(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = real(*words, **options)
        started.append(process.pid)
        return process

    with monkeypatch.context() as patch:
        patch.setattr(superlink.subprocess, "Popen", note)
        first = own_superlink(tmp_path)
        second = own_superlink(tmp_path)
        with first as one, second as two:
            patch.undo()
            assert one["FLWR_HOME"] != two["FLWR_HOME"]
            addresses = {(Path(each["FLWR_HOME"]) / "config.toml").read_text() for each in (one, two)}
            assert len(addresses) == 2
            assert all(listed(each, tmp_path) == {"success": True, "runs": []} for each in (one, two))
    assert not any(group_of(pid) for pid in started)
    assert not Path(one["FLWR_HOME"]).exists()


def test_superlink_that_does_not_start_is_told_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'the disk is full' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(superlink, "tool", lambda name: str(broken))
    with pytest.raises(FedHypeVAEError, match=r"ended with 3.*\n.*the disk is full"), own_superlink(tmp_path):
        pass


def test_two_demonstrations_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "outputs" / "demo"),
        pytest.raises(ConfigError, match="another demonstration runs"),
        alone_in(tmp_path / "outputs" / "demo"),
    ):
        pass
    with alone_in(tmp_path / "outputs" / "demo"), alone_in(tmp_path / "outputs" / "other"):
        pass
