"""Starting a run: what Flower's command printed says whether there is one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.config.presets import resolve
from common.errors import FederationError
from deploy.coordinator.folder import ServerFolder
from deploy.coordinator.run import start_run

APP = Path(__file__).resolve().parents[3]


def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: bytes | None) -> str:
    """The number of a run whose command printed this, and then did not end."""

    def hang(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 180, output=printed)

    monkeypatch.setattr(subprocess, "run", hang)
    (tmp_path / "server.toml").write_text('name = "study"\n')
    return start_run(ServerFolder(tmp_path), APP, resolve({}))


def test_a_run_is_started_whose_command_printed_its_number_and_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started(tmp_path, monkeypatch, b'{"success": true, "run-id": "17"}\n') == "17"


@pytest.mark.parametrize("printed", [None, b"", "Zürich: waiting".encode(), b'{"success": false, "run-id": null}'])
def test_a_command_that_hangs_before_it_printed_a_number_started_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: bytes | None
) -> None:
    with pytest.raises(FederationError, match=r"took no run \(no answer within 3 minutes\)"):
        started(tmp_path, monkeypatch, printed)
