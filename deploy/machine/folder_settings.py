"""What the settings files of a server's and a site's folder have in common, and the environment of their programs."""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from common.errors import ConfigError
from common.names import SITE_NAME
from common.texts import read_toml
from deploy.machine.environment import flower_environment

SiteName = Annotated[str, StringConstraints(pattern=SITE_NAME)]
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
Port = Annotated[int, Field(ge=1, le=65535)]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, or of `[address]:port` for IPv6."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_host(name: str) -> bool:
    """Whether a text is a host's name or an IP address."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        labels = name.removesuffix(".").split(".")
        return len(name) <= 253 and not labels[-1].isdecimal() and all(map(_LABEL.fullmatch, labels))


class FolderSettings(BaseModel):
    """A TOML file of a folder, one setting a line: an unknown line is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Settings from a TOML file.

        Raises:
            ConfigError: it is missing, no TOML, or a line is unknown or out of range.
        """
        try:
            return cls.model_validate(read_toml(path))
        except OSError as error:
            raise ConfigError(f"no settings at {path} ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            raise ConfigError(f"{path}: {where}: {first['msg']}") from None

    def write(self) -> str:
        """The same settings as TOML."""
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in self.model_dump().items())


def folder_environment(folder: Path, work: Path, *, local: bool = True) -> dict[str, str]:
    """Of a folder's programs: Flower's own files lie in it, not in the caller's home, since each node needs its own."""
    home = str((folder / ".flwr").resolve())
    return {**flower_environment(work.resolve(), local=local), "FLWR_HOME": home}
