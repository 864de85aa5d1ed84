"""The two folders of a deployment, the server's and a site's: where files lie, and how Flower's programs are started.

Only this module knows the command lines of the pinned Flower release.
"""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from common.durable import write_atomically
from common.errors import ConfigError
from common.names import SITE_NAME
from deploy.machine.environment import flower_environment, tool
from deploy.machine.supervise import Program
from server_app.register import REGISTER

SiteName = Annotated[str, StringConstraints(pattern=SITE_NAME)]
Port = Annotated[int, Field(ge=1, le=65535)]
CONNECTION = "federation"  # the name of our server in Flower's own configuration


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Settings from a TOML file.

        Raises:
            ConfigError: it is missing, no TOML, or a line is unknown or out of range.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(values)
        except OSError as error:
            raise ConfigError(f"no settings at {path} ({error.strerror})") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is no TOML: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            raise ConfigError(f"{path}: {where}: {first['msg']}") from None

    def write(self) -> str:
        """The same settings as TOML."""
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in self.model_dump().items())


class ServerSettings(_Settings):
    """server.toml. `fleet_*` is the gRPC link that sites reach; the control port stays on loopback."""

    name: SiteName
    fleet_host: str = "0.0.0.0"
    fleet_port: Port = 9092
    control_host: str = "127.0.0.1"
    control_port: Port = 8000
    health_port: Port = 8001


class SiteSettings(_Settings):
    """site.toml. `server` is host:port of the server's gRPC link; the other ports stay on loopback.

    `device` is where this site computes, whatever a run says; empty leaves it to the run. `warm_start` keeps a process
    with the libraries loaded, from which each message's starts (475 MB of memory, for some seconds a message).
    `reply_seconds` holds every reply that depends on records back to a multiple of so many seconds after its message
    came, so that its time tells nothing of the records; 0 sends it at once.
    """

    name: SiteName
    server: Annotated[str, StringConstraints(pattern=r"^[^\s:]+:[0-9]{1,5}$")]
    runtime_port: Port = 9094
    health_port: Port = 9095
    data_file: str = "site.parquet"
    device: Annotated[str, StringConstraints(pattern=r"^(|auto|cpu|cuda(:[0-9]{1,3})?)$")] = ""
    warm_start: bool = True
    reply_seconds: Annotated[float, Field(ge=0.0, le=3600.0)] = 0.0


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
        return {**_environment(self.path, self.work), REGISTER: str(self.register.resolve())}

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

        environment = _environment(self.path, self.path)
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
            Program("app", tuple(superexec), self.path / "logs" / "app.log"),
        )
        if self.warm is None:
            return programs
        starter = (sys.executable, "-P", "-m", "deploy.site.warm.starter", str(self.warm))
        return (*programs, Program("starter", starter, self.path / "logs" / "starter.log"))


def _environment(folder: Path, work: Path) -> dict[str, str]:
    home = str((folder / ".flwr").resolve())  # never the caller's own: each node needs its own
    return {**flower_environment(work.resolve()), "FLWR_HOME": home}


def _server_tls(path: Path) -> tuple[str, ...]:
    return (
        *("--ssl-ca-certfile", str(path / "ca.crt")),
        *("--ssl-certfile", str(path / "server.pem")),
        *("--ssl-keyfile", str(path / "server.key")),
    )


def _reached(host: str) -> str:
    return "127.0.0.1" if host in {"0.0.0.0", ""} else host
