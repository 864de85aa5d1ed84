"""A site's folder: where its files lie, and how Flower's programs are started.

Only this module knows Flower's command lines for a site's programs, in the pinned release.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, field_validator

from deploy.machine.environment import tool
from deploy.machine.folder_settings import FolderSettings, Port, SiteName, folder_environment, is_host, split_address
from deploy.machine.proxies import direct_locally
from deploy.machine.supervise import Program

ALIVE = "alive"  # in a site's folder: kept young while the site runs


class SiteSettings(FolderSettings):
    """site.toml. `server` is host:port of the server's gRPC link ([address]:port for IPv6); others stay on loopback.

    `device` is where this site computes, whatever a run says; empty leaves it to the run. `warm_start` keeps a process
    with the libraries loaded, from which each message's starts (475 MB of memory, for some seconds a message).
    `reply_seconds` holds every reply that depends on records back to a multiple of so many seconds after its message
    came, so that its time tells nothing of the records; 0 sends it at once.
    """

    name: SiteName
    server: Annotated[str, StringConstraints(pattern=r"^([^\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$")]
    runtime_port: Port = 9094
    health_port: Port = 9095
    data_file: str = "site.parquet"
    device: Annotated[str, StringConstraints(pattern=r"^(|auto|cpu|cuda(:[0-9]{1,3})?)$")] = ""
    warm_start: bool = True
    reply_seconds: Annotated[float, Field(ge=0.0, le=3600.0)] = 0.0

    @field_validator("server")
    @classmethod
    def _check_server(cls, server: str) -> str:
        host, port = split_address(server)
        if not 1 <= port <= 65535 or not is_host(host):
            raise ValueError(f"expected a host name or an IP address, and a port from 1 to 65535; found {server!r}")
        return server


@dataclass(frozen=True)
class SiteFolder:
    """A site's files, below `path`: all of them stay there, but for keys/node.pub."""

    path: Path

    @property
    def settings(self) -> SiteSettings:
        """site.toml."""
        return SiteSettings.read(self.path / "site.toml")

    @property
    def node_key(self) -> Path:
        """The private key; its public half lies beside it."""
        return self.path / "keys" / "node"

    @property
    def default_witness(self) -> Path:
        """Where the ledger's witness lies if nobody chose a place: outside this folder, which is put back as one."""
        whole = self.path.resolve()
        return whole.with_name(f"{whole.name}-witness") / "witness.json"

    @property
    def apps(self) -> Path:
        """App packages that arrived, by digest: approved ones and refused ones."""
        return self.path / "apps"

    @property
    def data(self) -> Path:
        """The site's embeddings."""
        return self.path / self.settings.data_file

    @property
    def warm(self) -> Path | None:
        """Where the socket of the warm starter lies, if there is to be one: it needs Linux."""
        return self.path.resolve() / "run" if self.settings.warm_start and sys.platform == "linux" else None

    def environment(self) -> dict[str, str]:
        """Of the site's programs: the commands that would run an app are ours, first on the path."""
        from deploy.site.app_guard import guard_folder

        environment = folder_environment(self.path, self.path, local=False)
        guarded = guard_folder(self.path, self.warm)
        return {**environment, "PATH": f"{guarded}:{environment['PATH']}", "FEDHYPEVAE_SITE": str(self.path.resolve())}

    def programs(self) -> tuple[Program, ...]:
        """The SuperNode, and the process that starts the app: apart, so that we choose what starts it, and how fast."""
        settings = self.settings
        secret = str(self.path / "keys" / "superexec.secret")
        node_config = " ".join(
            f"{key}={json.dumps(value)}"
            for key, value in (
                ("data-dir", str(self.path.resolve())),
                ("site-name", settings.name),
                ("data-file", settings.data_file),
                ("device", settings.device),
                ("reply-seconds", settings.reply_seconds),
            )
            if value
        )
        supernode = [
            tool("flower-supernode"),
            *("--grpc-rere", "--superlink", settings.server, "--root-certificates", str(self.path / "ca.crt")),
            *("--auth-supernode-private-key", str(self.node_key)),
            *("--host", "127.0.0.1", "--port", str(settings.runtime_port)),
            *("--health-server-address", f"127.0.0.1:{settings.health_port}"),
            *("--isolation", "process", "--superexec-auth-secret-file", secret),
            *("--node-config", node_config),
        ]
        superexec = [
            tool("flower-superexec"),
            *("--insecure", "--runtime-api-address", f"127.0.0.1:{settings.runtime_port}"),
            *("--superexec-auth-secret-file", secret),
        ]
        programs = (
            Program("supernode", tuple(supernode), self.path / "logs" / "supernode.log"),
            Program("app", tuple(superexec), self.path / "logs" / "app.log", direct_locally(os.environ)),
        )
        if self.warm is None:
            return programs
        starter = (sys.executable, "-P", "-m", "deploy.site.warm.starter", str(self.warm))
        return (*programs, Program("starter", starter, self.path / "logs" / "starter.log"))


def site_folder(path: Path) -> SiteFolder:
    """The site's folder at a path.

    Raises:
        ConfigError: it is none.
    """
    folder = SiteFolder(path)
    _ = folder.settings
    return folder
