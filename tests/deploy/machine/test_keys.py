"""Certificates and keys: who may read them, what they hold, and that they are what TLS accepts."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from common.errors import ConfigError
from deploy.machine.keys import (
    fingerprint,
    make_authority,
    make_node_key,
    make_secret,
    make_server_certificate,
    read_certificate,
    write_new,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_files_are_their_owners_alone(tmp_path: Path) -> None:
    make_authority(tmp_path / "ca", "trial")
    make_server_certificate(tmp_path / "ca", tmp_path / "server", ["localhost"])
    make_node_key(tmp_path / "keys" / "node")
    make_secret(tmp_path / "secret")
    for path in ("ca/ca.key", "server/server.key", "keys/node", "secret"):
        assert mode(tmp_path / path) == 0o600
    assert len((tmp_path / "secret").read_text()) == 64


def test_server_certificate_holds_every_name(tmp_path: Path) -> None:
    make_authority(tmp_path, "trial")
    make_server_certificate(tmp_path, tmp_path / "server", ["fl.example.org", "10.1.2.3", "::1"])
    certificate = read_certificate(tmp_path / "server" / "server.pem")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "::1"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_after_utc <= read_certificate(tmp_path / "ca.crt").not_valid_after_utc


@pytest.mark.parametrize(("authority", "host", "accepted"), [
    ("a", "localhost", True), ("b", "localhost", False), ("a", "elsewhere.example", False),
])  # fmt: skip
def test_tls_accepts_the_own_authority_and_the_right_name_alone(
    tmp_path: Path, authority: str, host: str, accepted: bool
) -> None:
    for name in ("a", "b"):
        make_authority(tmp_path / name, name)
    make_server_certificate(tmp_path / "a", tmp_path / "server", ["localhost"])
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(tmp_path / "server" / "server.pem", tmp_path / "server" / "server.key")
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            with served.wrap_socket(left, server_side=True) as link:
                link.recv(1)
        except OSError:
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    context = ssl.create_default_context(cafile=str(tmp_path / authority / "ca.crt"))
    try:
        if accepted:
            context.wrap_socket(right, server_hostname=host).close()
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                context.wrap_socket(right, server_hostname=host)
    finally:
        right.close()
        thread.join()


def test_node_key_is_never_overwritten(tmp_path: Path) -> None:
    shown = make_node_key(tmp_path / "node")
    with pytest.raises(ConfigError, match="never overwritten"):
        make_node_key(tmp_path / "node")
    assert fingerprint(tmp_path / "node.pub") == shown


def test_fingerprint_refuses_a_private_key_and_rubbish(tmp_path: Path) -> None:
    make_node_key(tmp_path / "node")
    with pytest.raises(ConfigError, match="never leaves its site"):
        fingerprint(tmp_path / "node")
    (tmp_path / "bad.pub").write_text("ssh-rsa AAAA")
    with pytest.raises(ConfigError, match=r"bad\.pub"):
        fingerprint(tmp_path / "bad.pub")


def test_write_new_has_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    write_new(tmp_path / "x", b"1", 0o600)
    assert mode(tmp_path / "x") == 0o600
    with pytest.raises(ConfigError):
        write_new(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1"
