"""Whether a node's link to the server works: name, port, TLS, the server's certificate, and that it speaks gRPC."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

_TIMEOUT_S = 10.0
_SOON = timedelta(days=30)


def examine_link(address: str, ca: Path) -> Iterable[str]:
    """Faults of the way to the server, at most one line.

    Args:
        address: host:port of the server's gRPC link.
        ca: the federation's authority.
    """
    host, _, port = address.rpartition(":")
    if not ca.is_file():
        return []  # told by the certificate's own check
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), timeout=_TIMEOUT_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as link,
        ):
            return _judge(link, address)
    except ssl.SSLCertVerificationError as error:
        return [_why_untrusted(error, host)]
    except socket.gaierror:
        return [f"server: the name {host} is not known here: correct `server` in site.toml, or ask for a DNS entry"]
    except (ConnectionRefusedError, TimeoutError, OSError) as error:
        what = "nobody listens" if isinstance(error, ConnectionRefusedError) else f"no answer ({type(error).__name__})"
        return [f"server: {address}: {what}: is the server started, and does the firewall let this machine out to it?"]


def _judge(link: ssl.SSLSocket, address: str) -> Iterable[str]:
    if link.selected_alpn_protocol() != "h2":
        return [f"server: {address} speaks TLS but not gRPC: is it the fleet port, and does a proxy end the TLS?"]
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
