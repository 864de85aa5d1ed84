"""The environment that Flower's processes get from us: no telemetry, no update check, no installing while running."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from deploy.machine.proxies import direct_locally

SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def flower_environment(work_folder: Path, *, local: bool = True) -> dict[str, str]:
    """This process's environment with Flower's switches set and its home inside `work_folder`.

    `local` programs talk to others of this machine, and through no proxy.
    """
    tools = str(Path(sys.executable).parent)  # Flower starts its own commands by name
    path = os.pathsep.join([tools, os.environ.get("PATH", "")])
    home = os.environ.get("FLWR_HOME", str(work_folder / ".flwr"))
    direct = direct_locally(os.environ) if local else {}
    return {**os.environ, **SETTINGS, **direct, "PATH": path, "FLWR_HOME": home, "FEDHYPEVAE_HOME": str(work_folder)}


def tool(name: str) -> str:
    """Full path of one of Flower's commands: beside this Python, or where its packages put their scripts."""
    beside = Path(sys.executable).parent / name
    return str(beside if beside.is_file() else Path(sysconfig.get_path("scripts")) / name)
