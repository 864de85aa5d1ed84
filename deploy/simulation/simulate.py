"""A federation on this machine: `flwr run` with Flower's simulation engine, watched until it is really done.

`flwr run --stream` exits 0 when the ServerApp crashes: so the run's own status is asked for afterwards.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.config.run import RunConfig
from common.errors import ConfigError, FedHypeVAEError
from common.texts import object_or_empty
from deploy.console import say
from deploy.machine.app_package import staged_app
from deploy.machine.environment import tool
from deploy.settings import settings_file
from deploy.simulation.superlink import own_superlink
from server_app.checkpoint import check_own

_SETTLE_S = 60.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NOISE = re.compile(
    r"^(INFO|WARNING|DEBUG) *:|^\d\d/\d\d/\d{4} |FutureWarning|^warnings.warn|pid=\d+|SuperLink"
    r"|Successfully (started|installed)|Flower configuration not found"
)


def simulate(
    config: RunConfig,
    *,
    work_folder: Path,
    app_folder: Path,
    cpus_per_site: int = 1,
    verbose: bool = False,
) -> Path:
    """Embed the demonstration's images where that was not done, run a federation in simulation, and wait for it.

    Args:
        config: of the run.
        work_folder: where outputs, caches and Flower's files go.
        app_folder: the project's folder, with its pyproject.toml.
        cpus_per_site: cores that one simulated site takes.
        verbose: show Flower's own log lines too.

    Returns:
        The run's output folder, which holds a summary.json of a completed run.

    Raises:
        ConfigError: the folder is another run's, or the pool can't be divided so; nothing was started.
        DataError: images or cache are damaged. FedHypeVAEError: the run failed; its own line says why.
    """
    from embeddings.simulation.simulated import open_pool

    output = work_folder / config.operation.output_dir
    check_own(output, resume=config.operation.resume)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "a simulation needs Flower's engine, which is not installed: "
            "pip install '.[simulation,offline-encoder]' in the project's folder"
        )
    open_pool(work_folder, config.federation)  # embedded once, here: every simulated site would wait for it
    (output / "status.json").unlink(missing_ok=True)
    federation = f"num-supernodes={config.federation.num_sites} client-resources-num-cpus={cpus_per_site}"
    options = ["local", "--stream", "--federation-config", federation]
    with (
        own_superlink(work_folder) as environment,
        staged_app(app_folder) as staged,
        settings_file(config) as settings,
    ):
        command = [tool("flwr"), "run", str(staged), *options, "--run-config", str(settings)]
        code, tail = _watched(command, environment, work_folder, verbose)
        return _outcome(output, code, tail, environment, work_folder)


def _watched(
    command: list[str], environment: Mapping[str, str], work_folder: Path, verbose: bool
) -> tuple[int, list[str]]:
    """Exit code of a command whose own lines are shown as they come, and its last lines."""
    process = subprocess.Popen(
        command, env=dict(environment), cwd=work_folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    tail = show_lines(process.stdout or (), verbose)
    return process.wait(), tail


def show_lines(lines: Iterable[str], verbose: bool) -> list[str]:
    """Print the run's own lines as they come; keep the last of all for the case of a failure."""
    tail: list[str] = []
    for line in lines:
        tail = [*tail[-60:], line.rstrip()]
        text = _COLOUR.sub("", line).strip()
        if verbose or (text and not text.startswith("error:") and not _NOISE.search(text)):
            say(line.rstrip())
    return tail


def _outcome(output: Path, code: int, tail: list[str], environment: Mapping[str, str], work_folder: Path) -> Path:
    """Whether the run completed: by its own status file and by Flower's word."""
    status = object_or_empty(output / "status.json")
    if status.get("status") == "failed":
        error = (
            ConfigError(str(status["error"])) if status.get("exit_code") == 2 else FedHypeVAEError(str(status["error"]))
        )
        raise error
    flower = _flower_status(environment, work_folder)
    if status.get("status") != "completed" or flower != "finished:completed" or code != 0:
        last = "\n".join(tail[-15:])
        raise FedHypeVAEError(
            f"the run did not complete (Flower says {flower}, exit code {code}); its last lines:\n{last}"
        )
    return output


def _flower_status(environment: Mapping[str, str], work_folder: Path) -> str:
    """Status of the newest run, as `flwr ls` tells it; the stream ends a moment before Flower has noted the end."""
    command = [tool("flwr"), "ls", "local", "--format", "json", "--limit", "1"]
    end = time.monotonic() + _SETTLE_S
    while True:
        done = subprocess.run(
            command, env=dict(environment), cwd=work_folder, capture_output=True, text=True, check=False
        )
        try:
            status = str(json.loads(done.stdout)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError):
            status = "nothing"
        if status.startswith("finished") or time.monotonic() >= end:
            return status
        time.sleep(1.0)
