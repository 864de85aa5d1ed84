"""A run on a deployed server: start it, follow it, and say how it ended by its own word.

The run goes on when this command is ended or loses its line to the server: `follow` asks for the run's status, and
the server app's status file tells the reason of a failure.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

from common.config.operation import OperationConfig
from common.config.run import RunConfig
from common.durable import make_private
from common.errors import ConfigError, FederationError, FedHypeVAEError
from common.names import STATUS
from common.texts import object_in
from deploy.coordinator.folder import CONNECTION, ServerFolder
from deploy.machine.app_package import staged_app
from deploy.machine.environment import tool
from deploy.machine.live import find_status, new_lines, read_status
from deploy.settings import settings_file
from server_app.checkpoint import check_own
from server_app.results import write_json

_POLL_S = 1.0
_ASK_S = 10.0  # each question to Flower is a process of its own, and seconds of a core


def in_own_folder(server: ServerFolder, config: RunConfig) -> RunConfig:
    """The same configuration with a folder for this run alone.

    One that names no output-dir takes the first of outputs/run, outputs/run-2, ... that is not there; or, where it goes
    on with a run, the newest of these that is not complete.

    Raises:
        ConfigError: the folder that it names, or that it would go on with, may not be written to (`check_own`).
    """
    operation = config.operation
    base = OperationConfig().output_dir
    if operation.output_dir == base:
        numbered = chain([base], (f"{base}-{number}" for number in count(2)))
        there = list(takewhile(lambda name: (server.work / name).exists(), numbered))
        if operation.resume:
            states = {name: _status_file(server.work / name / STATUS).get("status") for name in there}
            name = next((name for name in reversed(there) if states[name] != "completed"), base)
        else:
            name = f"{base}-{len(there) + 1}" if there else base
        config = config.replace(output_dir=name)
    check_own(server.work / config.operation.output_dir, resume=operation.resume)
    return config


def start_run(server: ServerFolder, app_folder: Path, config: RunConfig) -> str:
    """Send the app to the server and start it; returns the run's number.

    A number that Flower printed is believed, though its command ends badly or not at all: that run goes on.

    Raises:
        ConfigError: the folder holds no app, or the run's folder is another run's; nothing was started.
        FederationError: the server can't be reached.
    """
    server.connect()
    output = server.work / config.operation.output_dir
    check_own(output, resume=config.operation.resume)
    (output / "status.json").unlink(missing_ok=True)
    make_private(server.work)
    with staged_app(app_folder) as staged, settings_file(config) as settings:
        words = [str(staged), CONNECTION, "--format", "json", "--run-config", str(settings)]
        done = _ask(server, [tool("flwr"), "run", *words])
    answer = object_in(done.stdout)
    run_id = answer.get("run-id") or answer.get("run_id")
    if not answer.get("success", False) or run_id is None:
        lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        last = str(answer.get("error-message") or (lines[-1] if lines else "no word"))
        raise FederationError(
            f"the server took no run ({last}): is it started, and does its log say anything? (`fedhypevae doctor`)"
        )
    return str(run_id)


def run_status(server: ServerFolder, run_id: str) -> str:
    """Flower's status of a run, such as `running` or `finished:completed`; empty while the server is not there."""
    done = _ask(server, [tool("flwr"), "ls", CONNECTION, "--format", "json", "--run-id", run_id])
    try:
        return str(object_in(done.stdout)["runs"][0]["status"])
    except (KeyError, IndexError):
        return ""


def stop_run(server: ServerFolder) -> str:
    """Stop the run that is going on. What it did is on the disk: `--resume` goes on with it.

    Returns:
        Its number.

    Raises:
        ConfigError: no run is going on. FederationError: the server can't be asked, or does not stop it.
    """
    server.connect()
    listed = object_in(_ask(server, [tool("flwr"), "ls", CONNECTION, "--format", "json"]).stdout)
    if not listed.get("success", False):
        raise FederationError("the server can't be asked: is it started (`fedhypevae server start`)?")
    going = [run for run in listed["runs"] if not str(run["status"]).startswith("finished")]
    if not going:
        raise ConfigError(f"no run is going on at {server.path}: `fedhypevae status {server.path}` shows the newest")
    number = str(going[0]["run-id"])
    done = _ask(server, [tool("flwr"), "stop", number, CONNECTION, "--format", "json"])
    if not object_in(done.stdout).get("success", False):
        raise FederationError(f"the server did not stop run {number}: see its log")
    with suppress(FedHypeVAEError):  # it may not have written anything yet
        last = find_status(server.work)
        if last.values.get("status") in {"waiting", "running"}:
            stopped = {**last.values, "status": "failed", "error": "stopped by the coordinator", "exit_code": 1}
            write_json(last.folder / STATUS, stopped)
    return number


def follow(
    server: ServerFolder,
    run_id: str,
    config: RunConfig,
    tell: Callable[[str], None],
    *,
    patience_s: float = 7 * 86_400.0,
) -> Path:
    """Wait for a run's end.

    Args:
        server: where it runs.
        run_id: its number.
        config: of the run.
        tell: gets the status whenever it changes, and the line of each round.
        patience_s: seconds to wait at most.

    Returns:
        The folder with summary.json.

    Raises:
        FedHypeVAEError: it failed; the text is the run's own.
    """
    output, end, last = server.work / config.operation.output_dir, time.monotonic() + patience_s, ""
    lines, asked = new_lines(lambda: read_status(output / STATUS)), -math.inf
    while time.monotonic() < end:
        ended = _status_file(output / STATUS).get("status") in {"completed", "failed"}
        if ended or time.monotonic() - asked >= _ASK_S:
            status, asked = run_status(server, run_id) or "server not reached", time.monotonic()
            if status != last:
                tell(f"run {run_id}: {status}")
                last = status
        line = next(lines)
        if line is not None:
            tell(line)
        if last.startswith("finished"):
            return _result(output, last)
        time.sleep(_POLL_S)
    raise FederationError(f"run {run_id} is still {last} after {patience_s:g} s; it goes on: follow it later")


def _result(output: Path, status: str) -> Path:
    said = _status_file(output / "status.json")
    if status == "finished:completed" and said.get("status") == "completed":
        return output
    if said.get("status") == "failed":
        text = str(said["error"])
        raise ConfigError(text) if said.get("exit_code") == 2 else FedHypeVAEError(text)
    raise FederationError(
        f"the run ended as {status} without a word of its own (killed?): continue it with --resume "
        "and the same output-dir"
    )


def _status_file(path: Path) -> dict[str, Any]:
    try:
        return object_in(path.read_text(encoding="utf-8"))
    except OSError:
        return {}


def _ask(server: ServerFolder, command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=server.environment(), cwd=server.path, capture_output=True, text=True, check=False, timeout=180
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")  # bytes, though text was asked for
        return subprocess.CompletedProcess(command, 124, printed, "no answer within 3 minutes")
