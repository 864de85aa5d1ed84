"""Texts that `fedhypevae provision` writes: start scripts, systemd units, the proxy's snippet, the checklist."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from common.templates import fill

_FOLDER = Path(__file__).parent
_SWITCHES = (
    "FLWR_TELEMETRY_ENABLED=0",
    "FLWR_DISABLE_UPDATE_CHECK=1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
)


def start_script(command: str, verb: str) -> str:
    """A script that starts a node from its own folder."""
    return fill(_FOLDER / "start.sh.j2", {"command": shlex.quote(command), "verb": verb, "switches": _SWITCHES})


def unit(description: str, command: str, verb: str, folder: str, user: str) -> str:
    """A systemd unit with everything closed that the node does not need."""
    values = {"description": description, "command": command, "verb": verb, "folder": folder, "user": user}
    return fill(_FOLDER / "unit.service.j2", {**values, "switches": _SWITCHES})


def proxy(name: str, fleet_port: int) -> str:
    """An nginx snippet: it passes the sites' TLS link through untouched, and nothing else."""
    return fill(_FOLDER / "proxy.conf.j2", {"name": name, "fleet_port": fleet_port})


def checklist(name: str, sites: Sequence[str], server_folder: str, site_folder: str, address: str) -> str:
    """What the coordinator and each site do next, in order."""
    places = {"server_folder": server_folder, "site_folder": site_folder, "address": address}
    return fill(_FOLDER / "checklist.md.j2", {"name": name, "sites": sites, **places})
