"""From one TOML file to everything the server and the sites need, but for what a site must make itself.

A site's key, policy and ledger are made at the site by `init_site`: no file written here for a site is a secret.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from client_app.ledger.ledger import Ledger
from client_app.ledger.receipts import make_key as make_receipt_key
from client_app.policy.template import policy_template
from common.durable import keep_private, make_private
from common.errors import ConfigError
from deploy.coordinator import templates
from deploy.doctor import versions
from deploy.machine.folder_settings import (
    Port,
    ServerFolder,
    ServerSettings,
    SiteFolder,
    SiteName,
    SiteSettings,
    _Settings,
)
from deploy.machine.keys import (
    make_authority,
    make_node_key,
    make_secret,
    make_server_certificate,
    read_certificate,
    write_new,
)

HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:.-]{1,253}$")]


class FederationPlan(_Settings):
    """The file that `fedhypevae provision` reads.

    `server_names` are the host names and addresses by which sites reach the server, the first of them the one that
    is written into the sites' settings.
    """

    name: SiteName
    server_names: Annotated[list[HostName], Field(min_length=1)]
    sites: Annotated[list[SiteName], Field(min_length=1)]
    fleet_port: Port = 9092
    control_port: Port = 8000
    health_port: Port = 8001
    server_folder: str = "/srv/fedhypevae-server"
    site_folder: str = "/srv/fedhypevae-site"
    classes: list[str] = Field(default_factory=list)
    user: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] = "fedhypevae"

    @model_validator(mode="after")
    def _check(self) -> FederationPlan:
        double = next((name for name in self.sites if self.sites.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"site {double} is listed twice")
        return self

    @property
    def address(self) -> str:
        """host:port that sites connect to."""
        return f"{self.server_names[0]}:{self.fleet_port}"


def provision(plan: FederationPlan, out: Path) -> list[Path]:
    """Write the authority, the server's folder, a folder to send to each site, and a checklist.

    Args:
        plan: server and sites.
        out: a folder that does not exist yet, or is empty.

    Returns:
        The files written, in order.

    Raises:
        ConfigError: the folder holds something; nothing was changed.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another folder, so that no key is overwritten")
    make_private(out)
    make_authority(out / "authority", plan.name)
    server = out / "server"
    local = [name for name in ("localhost", "127.0.0.1") if name not in plan.server_names]
    make_server_certificate(out / "authority", server, [*plan.server_names, *local])
    ca = (out / "authority" / "ca.crt").read_bytes()
    write_new(server / "ca.crt", ca)
    make_secret(server / "superexec.secret")
    settings = ServerSettings(
        name=plan.name, fleet_port=plan.fleet_port, control_port=plan.control_port, health_port=plan.health_port
    )
    command = str(Path(sys.executable).parent / "fedhypevae")
    write_new(server / "server.toml", settings.write().encode())
    write_new(server / "start.sh", templates.start_script(command, "server").encode(), 0o755)
    unit = templates.unit(f"FedHypeVAE server of {plan.name}", command, "server", plan.server_folder, plan.user)
    write_new(server / "fedhypevae-server.service", unit.encode())
    write_new(server / "proxy.conf", templates.proxy(plan.server_names[0], plan.fleet_port).encode())
    agreed = json.dumps({"name": plan.name, "versions": versions(), "classes": plan.classes}, indent=2) + "\n"
    for name in plan.sites:
        folder = out / "sites" / name
        write_new(folder / "ca.crt", ca)
        write_new(folder / "federation.json", agreed.encode())
        write_new(folder / "site.toml", SiteSettings(name=name, server=plan.address).write().encode())
        write_new(folder / "start.sh", templates.start_script("fedhypevae", "site start").encode(), 0o755)
        unit = templates.unit(f"FedHypeVAE site {name}", "fedhypevae", "site start", plan.site_folder, plan.user)
        write_new(folder / "fedhypevae-site.service", unit.encode())
    text = templates.checklist(plan.name, plan.sites, plan.server_folder, plan.site_folder, plan.address)
    write_new(out / "CHECKLIST.md", text.encode())
    return sorted(path for path in out.rglob("*") if path.is_file())


def init_site(
    folder: Path,
    cohort_id: str,
    *,
    lifetime_epsilon: float,
    lifetime_delta: float,
    run_epsilon: float,
    witness: str = "",
    **others: str | float | bool | tuple[str, ...],
) -> str:
    """Make what only the site itself may make: its keys, its secret, its policy, its ledger and the ledger's witness.

    Args:
        folder: the site's folder, with the site.toml and ca.crt that the coordinator sent.
        cohort_id: permanent name of the people the data is about.
        lifetime_epsilon: ε of everything ever released, at `lifetime_delta`.
        lifetime_delta: its δ.
        run_epsilon: ε of one run.
        witness: a second place for the ledger's head, best on another disk; empty: a folder beside the site's.
        others: other lines of the policy.

    Returns:
        The fingerprint of the new node key, to be compared with the coordinator's by telephone.

    Raises:
        ConfigError: the coordinator's files are missing, a key, policy or ledger is there already, or the witness's
            folder can't be made.
    """
    site = SiteFolder(folder)
    _ = site.settings
    read_certificate(folder / "ca.crt")
    witness = witness or str(site.default_witness)
    text = policy_template(
        cohort_id,
        lifetime_epsilon=lifetime_epsilon,
        lifetime_delta=lifetime_delta,
        run_epsilon=run_epsilon,
        witness=witness,
        **others,
    )
    _refuse_existing((folder / "policy.toml", site.node_key, folder / "ledger.db", folder / witness))
    try:
        make_private((folder / witness).parent)
    except OSError as error:
        raise ConfigError(
            f"can't make the folder of the ledger's witness, {(folder / witness).parent} ({error.strerror}): make it "
            "for the site's user, or name another place, best on another disk, with --witness"
        ) from None
    shown = make_node_key(site.node_key)
    make_secret(folder / "keys" / "superexec.secret")
    write_new(folder / "policy.toml", text.encode(), 0o600)
    make_receipt_key(folder)
    Ledger.create(folder / "ledger.db", cohort_id, folder / witness).close()
    keep_private(folder)
    return shown


def renew_site_key(folder: Path) -> str:
    """Make a new node key and keep the old one beside it, for `fedhypevae site rotate` at the server."""
    site = SiteFolder(folder)
    if site.node_key.is_file():
        number = 1
        while (kept := site.node_key.with_name(f"node.old-{number}")).exists():
            number += 1
        site.node_key.rename(kept)
    return make_node_key(site.node_key)


def server_folder(path: Path) -> ServerFolder:
    """The server's folder at a path.

    Raises:
        ConfigError: it is none.
    """
    folder = ServerFolder(path)
    _ = folder.settings
    return folder


def site_folder(path: Path) -> SiteFolder:
    """The site's folder at a path.

    Raises:
        ConfigError: it is none.
    """
    folder = SiteFolder(path)
    _ = folder.settings
    return folder


def _refuse_existing(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(
                f"{path} exists already: this site was set up before; its ledger and key stay as they are"
            )
