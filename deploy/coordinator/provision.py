"""From one TOML file to everything the server and the sites need, but for what a site must make itself.

A site's key, policy and ledger are made at the site by `init_site`: no file written here for a site is a secret.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from common.durable import make_private
from common.errors import ConfigError
from deploy.coordinator import templates
from deploy.coordinator.folder import ServerSettings
from deploy.machine.folder_settings import FolderSettings, Port, SiteName, is_host
from deploy.machine.keys import (
    make_authority,
    make_secret,
    make_server_certificate,
    write_new,
)
from deploy.machine.versions import versions
from deploy.site.folder import SiteSettings
from deploy.site.unit import SIMPLE_PATH, UNIT
from embeddings.readers.classes import class_list

UnitPath = Annotated[str, StringConstraints(pattern=SIMPLE_PATH)]


def _class_names(names: list[str]) -> list[str]:
    return list(class_list(names, ())) if names else []


class FederationPlan(FolderSettings):
    """The file that `fedhypevae provision` reads.

    `server_names` are the host names and addresses by which sites reach the server, the first of them the one that
    is written into the sites' settings. `encoder` and its revision are what sites embed with: their doctors compare.
    """

    name: SiteName
    server_names: Annotated[list[str], Field(min_length=1)]
    sites: Annotated[list[SiteName], Field(min_length=1)]
    fleet_port: Port = 9092
    control_port: Port = 8000
    health_port: Port = 8001
    server_folder: UnitPath = "/srv/fedhypevae-server"
    site_folder: UnitPath = "/srv/fedhypevae-site"
    classes: Annotated[list[str], AfterValidator(_class_names)] = Field(default_factory=list)
    encoder: Annotated[str, StringConstraints(max_length=200)] = ""
    encoder_revision: Annotated[str, StringConstraints(max_length=200)] = ""
    user: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] = "fedhypevae"

    @model_validator(mode="after")
    def _check(self) -> FederationPlan:
        double = next((name for name in self.sites if self.sites.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"site {double} is listed twice")
        for name in self.server_names:
            if not is_host(name):
                raise ValueError(f"server_names: expected host names and IP addresses (IPv6 bare), found {name!r}")
        if len({self.fleet_port, self.control_port, self.health_port}) < 3:
            raise ValueError("fleet_port, control_port and health_port must differ: give each its own")
        return self

    @property
    def address(self) -> str:
        """host:port that sites connect to."""
        name = self.server_names[0]
        return f"[{name}]:{self.fleet_port}" if ":" in name else f"{name}:{self.fleet_port}"


def provision(plan: FederationPlan, out: Path) -> list[Path]:
    """Write the authority, the server's folder, a folder to send to each site, and a checklist.

    Args:
        plan: server and sites.
        out: a folder that does not exist yet, or is empty.

    Returns:
        The files written, in order.

    Raises:
        ConfigError: the folder holds something or can't be made; nothing was changed.
    """
    host = "[::]" if any(":" in name for name in plan.server_names) else "0.0.0.0"  # the former takes IPv4 as well
    settings = ServerSettings(
        name=plan.name,
        fleet_host=host,
        fleet_port=plan.fleet_port,
        control_port=plan.control_port,
        health_port=plan.health_port,
    )
    sites = {name: SiteSettings(name=name, server=plan.address) for name in plan.sites}
    try:
        make_private(out)
        if any(out.iterdir()):
            raise ConfigError(f"{out} is not empty: choose another folder, so that no key is overwritten")
    except OSError as error:
        raise ConfigError(f"can't make the folder {out} ({error.strerror}): choose another") from None
    make_authority(out / "authority", plan.name)
    server = out / "server"
    local = [name for name in ("localhost", "127.0.0.1") if name not in plan.server_names]
    make_server_certificate(out / "authority", server, [*plan.server_names, *local])
    ca = (out / "authority" / "ca.crt").read_bytes()
    write_new(server / "ca.crt", ca)
    make_secret(server / "superexec.secret")
    command = str(Path(sys.executable).parent / "fedhypevae")
    write_new(server / "server.toml", settings.write().encode())
    write_new(server / "start.sh", templates.start_script(command, "server start").encode(), 0o755)
    unit = templates.unit(f"FedHypeVAE server of {plan.name}", command, "server start", plan.server_folder, plan.user)
    write_new(server / "fedhypevae-server.service", unit.encode())
    write_new(server / "proxy.conf", templates.proxy(plan.server_names[0], plan.fleet_port).encode())
    facts = {"classes": plan.classes, "encoder": plan.encoder, "encoder_revision": plan.encoder_revision}
    agreed = json.dumps({"name": plan.name, "versions": versions(), **facts}, indent=2) + "\n"
    for name, site in sites.items():
        folder = out / "sites" / name
        write_new(folder / "ca.crt", ca)
        write_new(folder / "federation.json", agreed.encode())
        write_new(folder / "site.toml", site.write().encode())
        write_new(folder / "start.sh", templates.start_script("fedhypevae", "site start").encode(), 0o755)
        unit = templates.unit(f"FedHypeVAE site {name}", "fedhypevae", "site start", plan.site_folder, plan.user)
        write_new(folder / UNIT, unit.encode())
    text = templates.checklist(plan.name, plan.sites, plan.server_folder, plan.site_folder, plan.address)
    write_new(out / "CHECKLIST.md", text.encode())
    return sorted(path for path in out.rglob("*") if path.is_file())
