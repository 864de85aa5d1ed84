"""Whether a node's link to the server works: name, port, TLS, the server's certificate, and that it speaks gRPC."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deploy.machine.folder_settings import split_address
from deploy.machine.proxies import Proxy, ignored, proxy_of

_TIMEOUT_S = 10.0
_LONGEST_ANSWER = 16_384
_SOON = timedelta(days=30)


def examine_link(address: str, ca: Path, environment: Mapping[str, str]) -> Iterable[str]:
    """Faults of the way to the server, at most one line.

    Args:
        address: host:port of the server's gRPC link.
        ca: the federation's authority.
        environment: of the program that will open the link: its proxy is taken here, too.
    """
    host, port = split_address(address)
    if not ca.is_file():
        return []  # reported by the certificate's own check
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    proxy = proxy_of(host, environment)
    try:
        with (
            _opened(host, port, proxy, address) as raw,
            context.wrap_socket(raw, server_hostname=host) as link,
        ):
            if link.selected_alpn_protocol() == "h2":
                return _ending(link)
            fault = f"server: {address} speaks TLS but not gRPC: is it the fleet port, and does a proxy end the TLS?"
    except ssl.SSLCertVerificationError as error:
        fault = _why_untrusted(error, host)
    except OSError as error:
        fault = _why_unreached(error, host, address, proxy)
    return [fault + _by_way_of(proxy, host, environment)]


def _opened(host: str, port: int, proxy: Proxy | None, address: str) -> socket.socket:
    """A connection to the server, or through a proxy that was asked for one; OSError where it refuses."""
    raw = socket.create_connection((host, port) if proxy is None else (proxy.host, proxy.port), timeout=_TIMEOUT_S)
    if proxy is not None:
        try:
            raw.sendall(proxy.request(address))
            answer = b""
            while b"\r\n\r\n" not in answer and len(answer) < _LONGEST_ANSWER and (piece := raw.recv(1)):
                answer += piece  # byte by byte: what follows the answer is TLS already
            if re.match(rb"HTTP/1\.[01] 2[0-9][0-9]\b", answer) is None:
                status = answer.split(b"\r\n")[0][:60].decode("ascii", "replace")
                raise OSError(None, f"the proxy answers {status!r}")
        except OSError:
            raw.close()
            raise
    return raw


def _why_unreached(error: OSError, host: str, address: str, proxy: Proxy | None) -> str:
    if isinstance(error, socket.gaierror):
        if proxy is not None:
            return f"server: the name {proxy.host} of the proxy is not known here"
        return f"server: the name {host} is not known here: correct `server` in site.toml, or ask for a DNS entry"
    reached = address if proxy is None else f"{address}: proxy {proxy.host}:{proxy.port}"
    what = "nobody listens" if isinstance(error, ConnectionRefusedError) else f"no answer ({type(error).__name__})"
    if error.errno is None and error.strerror:
        what = error.strerror
    return f"server: {reached}: {what}: is the server started, and does the firewall let this machine out to it?"


def _by_way_of(proxy: Proxy | None, host: str, environment: Mapping[str, str]) -> str:
    """What a fault's line adds of the variables that name proxies."""
    if proxy is not None:
        return f" {proxy.variable} is set: the link goes through it; unset it, or set no_proxy={host}"
    names = ignored(environment)
    return f" {names[0]} is set, but gRPC takes it not: https_proxy=http://HOST:PORT is what it reads" if names else ""


def _ending(link: ssl.SSLSocket) -> Iterable[str]:
    certificate = link.getpeercert() or {}
    ends = certificate.get("notAfter")
    if isinstance(ends, str):
        end = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)
        if end - datetime.now(UTC) < _SOON:
            return [f"certificate: the server's ends on {end:%Y-%m-%d}: tell the coordinator"]
    return []


def _why_untrusted(error: ssl.SSLCertVerificationError, host: str) -> str:
    reason = error.verify_message
    if "expired" in reason:
        return "certificate: the server's has ended: tell the coordinator, or set this machine's clock"
    if "not yet valid" in reason:
        return "clock: the server's certificate is not valid yet by this machine's clock: set the clock (NTP)"
    if "match" in reason or "mismatch" in reason:
        return f"certificate: the server's does not hold the name {host}: use a name of server_names in site.toml"
    return f"certificate: the server's is not signed by the authority in ca.crt ({reason}): ask for ca.crt again"
