"""From one TOML file to everything the server and the sites need, but for what a site must make itself.

A site's key, policy and ledger are made at the site by `init_site`: no file written here for a site is a secret.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from common.durable import make_private
from common.errors import ConfigError
from deploy.coordinator import templates
from deploy.coordinator.folder import ServerSettings
from deploy.machine.folder_settings import FolderSettings, Port, SiteName
from deploy.machine.keys import (
    make_authority,
    make_secret,
    make_server_certificate,
    write_new,
)
from deploy.machine.versions import versions
from deploy.site.folder import SiteSettings

HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:.-]{1,253}$")]


class FederationPlan(FolderSettings):
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
