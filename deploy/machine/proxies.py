"""Which proxy a gRPC link of this machine takes: by the variables that gRPC reads, and as it reads them.

Source: grpc/src/core/handshaker/http_connect/http_proxy_mapper.cc; found alike by trying gRPC 1.85 itself.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
_PORT = 443  # gRPC's own, where the proxy's URL names none
_LOOPBACK = "localhost,127.0.0.1,::1"


@dataclass(frozen=True)
class Proxy:
    """A proxy and the variable that names it. `user` is a line of the request, and never shown."""

    variable: str
    host: str
    port: int
    user: str = ""

    def request(self, address: str) -> bytes:
        """What asks the proxy for a link to host:port."""
        return f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{self.user}\r\n".encode()


def proxy_of(host: str, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy of a link, None for a direct one: the first variable that is set decides, even if it can't be used.

    Args:
        host: of the server, without brackets.
        environment: of the process that opens the link.
    """
    variable = next((name for name in _VARIABLES if name in environment), None)
    if variable is None or is_excepted(host, environment):
        return None
    text = environment[variable].rstrip()
    try:
        url = urlsplit(text)
        port = _PORT if url.port is None else url.port
    except ValueError:
        return None
    if text[:7].lower() != "http://" or not url.hostname:
        return None
    user = ""
    if "@" in url.netloc:
        secret = base64.b64encode(unquote(url.netloc.rpartition("@")[0]).encode()).decode()
        user = f"Proxy-Authorization: Basic {secret}\r\n"
    return Proxy(variable, url.hostname, port, user)


def is_excepted(host: str, environment: Mapping[str, str]) -> bool:
    """Whether a host is among those that are reached without a proxy: itself, below a domain, or in a network."""
    listed = next((environment[name] for name in _EXCEPTIONS if name in environment), "")
    return any(_covers(entry.strip().lower(), host.lower()) for entry in listed.split(",") if entry.strip())


def _covers(entry: str, host: str) -> bool:
    name = entry.removeprefix(".")
    if host == name or host.endswith(f".{name}"):
        return True
    network, slash, length = entry.partition("/")
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        prefix = min(int(length), address.max_prefixlen)
        return bool(slash) and address in ipaddress.ip_network(f"{network}/{prefix}", strict=False)
    return False


def ignored(environment: Mapping[str, str]) -> list[str]:
    """Variables that look as if they named a proxy and that gRPC does not take: of another spelling or form."""
    shown = [name for name in environment if name.lower() in {*_VARIABLES, "all_proxy"} and environment[name]]
    return [] if proxy_of("", environment) else sorted(shown)


def direct_locally(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable by which links between programs of one machine take no proxy, whatever else the machine says."""
    listed = next((environment[name] for name in _EXCEPTIONS if name in environment), "")
    return {"no_grpc_proxy": ",".join(part for part in (listed, _LOOPBACK) if part)}
