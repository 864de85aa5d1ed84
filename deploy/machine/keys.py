"""Certificates of the federation and the sites' node keys. A private key is written once, readable by its owner alone.

The certificate authority is the federation's own: it vouches for the server to the sites. Sites are known by their
keys (ECDSA P-384), which they make themselves; only the public half travels.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.durable import make_private
from common.errors import ConfigError, ProtocolError
from common.secagg.primitives import load_public, new_node_key

CA_DAYS = 3650
SERVER_DAYS = 825
_SKEW = timedelta(hours=1)  # a site's clock may be behind


def write_new(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that must not exist yet, with its permissions from the first byte on.

    Raises:
        ConfigError: it is there already, or the folder can't be written.
    """
    make_private(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise ConfigError(f"{path} exists already: it is never overwritten; move it away first") from None
    except OSError as error:
        raise ConfigError(f"can't write {path} ({error.strerror})") from error
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_authority(folder: Path, name: str) -> None:
    """Make `ca.key` (0600) and `ca.crt` in a folder: the federation's own certificate authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
    certificate = (
        _begun(subject, subject, key, datetime.now(UTC) + timedelta(days=CA_DAYS), is_authority=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_new(folder / "ca.key", _private_pem(key), 0o600)
    write_new(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_server_certificate(authority: Path, folder: Path, names: Sequence[str]) -> None:
    """Make `server.key` (0600) and `server.pem` in a folder, signed by an authority.

    Args:
        authority: folder with ca.key and ca.crt.
        folder: where they go.
        names: host names and IP addresses by which sites reach the server; each becomes a subject alternative name.

    Raises:
        ConfigError: no name, or the authority's files can't be read.
    """
    if not names:
        raise ConfigError("a server certificate needs at least one name by which sites reach it")
    try:
        ca_key = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
        ca = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the authority in {authority} can't be read ({type(error).__name__})") from error
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{authority / 'ca.key'} is not a key that this command made")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    end = min(datetime.now(UTC) + timedelta(days=SERVER_DAYS), ca.not_valid_after_utc)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    certificate = (
        _begun(subject, ca.subject, key, end, is_authority=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    write_new(folder / "server.key", _private_pem(key), 0o600)
    write_new(folder / "server.pem", certificate.public_bytes(serialization.Encoding.PEM))


def make_node_key(path: Path) -> str:
    """Make a site's key pair: `path` (0600) and `path`.pub, in OpenSSH format.

    Returns:
        The public key's fingerprint.

    Raises:
        ConfigError: a key is there already.
    """
    private, line = new_node_key()
    write_new(path, private, 0o600)
    public = path.with_suffix(".pub")
    public.unlink(missing_ok=True)  # of a private key that was moved away
    write_new(public, line)
    return fingerprint(public)


def fingerprint(public: Path) -> str:
    """Digest of a public node key, for two people to compare by telephone.

    Raises:
        ConfigError: the file holds no P-384 public key; in particular, a private one is refused.
    """
    try:
        content = public.read_bytes()
    except OSError as error:
        raise ConfigError(f"no public key at {public} ({error.strerror})") from None
    if b"PRIVATE" in content:
        raise ConfigError(f"{public} is a private key, which never leaves its site: send the .pub file, make a new key")
    try:
        key = load_public(content.decode("utf-8", "replace"))
    except ProtocolError as error:
        raise ConfigError(f"{public}: {error}: make one with `fedhypevae site init`") from None
    raw = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashlib.sha256(raw).hexdigest()
    return ":".join(digest[start : start + 4] for start in range(0, 32, 4))


def make_secret(path: Path) -> None:
    """Make the secret that a node and its app process share on one machine (0600)."""
    write_new(path, secrets.token_hex(32).encode(), 0o600)


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM format.

    Raises:
        ConfigError: there is none, or it can't be read.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"no certificate at {path} ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{path} is no certificate in PEM format: ask the coordinator for ca.crt again") from None


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    # PKCS8 is what both gRPC and the HTTP server of Flower read
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime, *, is_authority: bool
) -> x509.CertificateBuilder:
    """What both kinds of certificate hold: names, key, times, and whether the key may sign certificates."""
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    unused = dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
    usage = x509.KeyUsage(
        digital_signature=not is_authority, key_cert_sign=is_authority, crl_sign=is_authority, **unused
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), critical=True)
        .add_extension(usage, critical=True)
    )
