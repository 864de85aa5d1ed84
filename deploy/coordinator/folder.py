"""The server's folder: where its files lie, and how Flower's programs are started.

Only this module knows Flower's command lines for the server's programs, in the pinned release.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from common.durable import write_atomically
from deploy.machine.environment import tool
from deploy.machine.folder_settings import FolderSettings, Port, SiteName, folder_environment
from deploy.machine.supervise import Program
from server_app.register import REGISTER

CONNECTION = "federation"  # the name of our server in Flower's own configuration


class ServerSettings(FolderSettings):
    """server.toml. `fleet_*` is the gRPC link that sites reach; the control port stays on loopback."""

    name: SiteName
    fleet_host: str = "0.0.0.0"
    fleet_port: Port = 9092
    control_host: str = "127.0.0.1"
    control_port: Port = 8000
    health_port: Port = 8001


@dataclass(frozen=True)
class ServerFolder:
    """The server's files, below `path`."""

    path: Path

    @property
    def settings(self) -> ServerSettings:
        """server.toml."""
        return ServerSettings.read(self.path / "server.toml")

    @property
    def work(self) -> Path:
        """Where runs write their results."""
        return self.path / "work"

    @property
    def register(self) -> Path:
        """Which sites are known: by it the server app holds a site's name against its key."""
        return self.path / "sites.json"

    def environment(self) -> dict[str, str]:
        """Of the server's programs and of the coordinator's commands: Flower's files lie in this folder."""
        return {**folder_environment(self.path, self.work), REGISTER: str(self.register.resolve())}

    def programs(self) -> tuple[Program, ...]:
        """The SuperLink, and the process that runs server apps; the second can't be replaced from outside."""
        settings, certificates = self.settings, _server_tls(self.path)
        secret = str(self.path / "superexec.secret")
        superlink = [
            tool("flower-superlink"),
            *("--host", settings.control_host, "--port", str(settings.control_port)),
            *("--fleet-api-type", "grpc-rere"),
            *("--fleet-api-address", f"{settings.fleet_host}:{settings.fleet_port}"),
            *("--health-server-address", f"127.0.0.1:{settings.health_port}"),
            *certificates,
            "--enable-supernode-auth",
            *("--database", str(self.path / "superlink.db")),
            *("--isolation", "process", "--superexec-auth-secret-file", secret),
            "--disable-runtime-dependency-installation",
        ]
        superexec = [
            tool("flower-superexec"),
            *("--runtime-api-address", f"{_reached(settings.control_host)}:{settings.control_port}"),
            *("--root-certificates", str(self.path / "ca.crt")),
            *("--superexec-auth-secret-file", secret),
        ]
        return (
            Program("superlink", tuple(superlink), self.path / "logs" / "superlink.log"),
            Program("server-app", tuple(superexec), self.path / "logs" / "server-app.log"),
        )

    def connect(self) -> None:
        """Tell Flower's command line where this server is."""
        settings = self.settings
        home = self.path / ".flwr"
        text = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "{_reached(settings.control_host)}:{settings.control_port}"\n'
            f"root-certificates = {json.dumps(str((self.path / 'ca.crt').resolve()))}\n"
        )
        write_atomically(home / "config.toml", text.encode())


def _server_tls(path: Path) -> tuple[str, ...]:
    return (
        *("--ssl-ca-certfile", str(path / "ca.crt")),
        *("--ssl-certfile", str(path / "server.pem")),
        *("--ssl-keyfile", str(path / "server.key")),
    )


def _reached(host: str) -> str:
    return "127.0.0.1" if host in {"0.0.0.0", ""} else host


def server_folder(path: Path) -> ServerFolder:
    """The server's folder at a path.

    Raises:
        ConfigError: it is none.
    """
    folder = ServerFolder(path)
    _ = folder.settings
    return folder
