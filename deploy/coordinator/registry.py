"""The sites that a server knows: registered by public key, listed, revoked, given a new key.

Flower keeps node ids; `sites.json` beside the server's files keeps which site has which.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import ConfigError, FederationError
from common.names import SITE_NAME
from common.texts import object_in, read_json
from deploy.coordinator.folder import CONNECTION, ServerFolder
from deploy.machine.environment import tool
from deploy.machine.keys import fingerprint
from server_app.receipts import FILE as RECEIPTS
from server_app.receipts import move_receipt
from server_app.register import REVOKED


@dataclass(frozen=True)
class Registered:
    """A site as the server knows it; `status` is Flower's word for it, "revoked" once it is taken off."""

    name: str
    node_id: str
    fingerprint: str
    since: str
    status: str


def register(server: ServerFolder, name: str, public_key: Path) -> Registered:
    """Let a site in, by its public key.

    Raises:
        ConfigError: no such key, or a site of this name is registered. FederationError: the server can't be asked, or
            refuses the key.
    """
    if re.fullmatch(SITE_NAME, name) is None:
        raise ConfigError(f"a site's name has small letters, digits and hyphens, found {name!r}")
    shown = fingerprint(public_key)
    book = _read(server)
    if any(site.name == name and site.status != REVOKED for site in book):
        raise ConfigError(f"site {name} is registered already: revoke it first, or rotate its key")
    answer = _flower(server, "register", str(public_key.resolve()), CONNECTION, "--name", name)
    site = Registered(
        name, str(answer["node-id"]), shown, datetime.now(UTC).isoformat(timespec="seconds"), "registered"
    )
    _write(server, [*book, site])
    return site


def revoke(server: ServerFolder, name: str) -> Registered:
    """Shut a site out, by its name or the number of its node: its key is refused from now on.

    Raises:
        ConfigError: no such site. FederationError: the server can't be asked.
    """
    book = _read(server)
    site = next((one for one in book if name in (one.name, one.node_id) and one.status != REVOKED), None)
    if site is None:
        raise ConfigError(f"no site {name} is registered; see `fedhypevae server list`")
    _flower(server, "unregister", site.node_id, CONNECTION)
    revoked = replace(site, status=REVOKED)
    _write(server, [revoked if one is site else one for one in book])
    return revoked


def rotate(server: ServerFolder, name: str, public_key: Path, *, forget: bool = False) -> Registered:
    """Give a site a new key; the old one is refused from now on.

    Args:
        server: the server's folder.
        name: the site.
        public_key: its new key.
        forget: also forget the last receipt of its ledger, which it gets back with every request: only for a site whose
            people say that its ledger was rightly begun again.

    Raises:
        ConfigError: no such site or key, or the key was used before. FederationError: the server can't be asked.
    """
    new = fingerprint(public_key)
    if any(site.fingerprint == new for site in _read(server)):
        raise ConfigError(f"the key {new} was used before: make a new one at the site")
    before = revoke(server, name)
    after = register(server, name, public_key)
    move_receipt(server.work / RECEIPTS, before.node_id, None if forget else after.node_id)
    return after


def list_sites(server: ServerFolder) -> list[Registered]:
    """All sites ever registered, with Flower's word on who is online."""
    answer = _flower(server, "list", CONNECTION)
    status = {str(node["node-id"]): str(node["status"]) for node in answer["nodes"]}
    return [
        site if site.status == REVOKED else replace(site, status=status.get(site.node_id, "unknown"))
        for site in _read(server)
    ]


def _flower(server: ServerFolder, verb: str, *words: str) -> dict[str, Any]:
    """Ask the server through Flower's own command line."""
    server.connect()
    command: Sequence[str] = (tool("flwr"), "supernode", verb, *words, "--format", "json")
    try:
        done = subprocess.run(
            command, env=server.environment(), cwd=server.path, capture_output=True, text=True, check=False, timeout=120
        )
    except subprocess.TimeoutExpired:
        raise FederationError(
            "the server did not answer within 2 minutes: is it started (`fedhypevae server start`)?"
        ) from None
    answer = object_in(done.stdout)
    if done.returncode != 0 or not answer.get("success", False):
        last = next((line for line in reversed((done.stdout + done.stderr).splitlines()) if line.strip()), "no word")
        reason = str(answer.get("error-message") or last.strip())
        raise FederationError(f"the server would not {verb} the site: {reason}")
    return answer


def _read(server: ServerFolder) -> list[Registered]:
    path = server.register
    if not path.is_file():
        return []
    try:
        return [Registered(**site) for site in read_json(path)]
    except TypeError as error:
        raise ConfigError(f"{path} can't be read ({type(error).__name__}): restore it from a copy") from None


def _write(server: ServerFolder, sites: Sequence[Registered]) -> None:
    from common.durable import write_output

    write_output(server.register, (json.dumps([asdict(site) for site in sites], indent=2) + "\n").encode())
