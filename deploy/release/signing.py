"""The coordinator's signature under a bundle: Ed25519 over SHA256SUMS, which names every other file.

The private key is made once and stays with the coordinator (0600). Its public half travels in the bundle; what binds it
to a person is the fingerprint, which the coordinator publishes elsewhere and a reader gives to `release verify --key`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import ConfigError, FedHypeVAEError
from deploy.machine.keys import write_new

_FIELDS = ("algorithm", "not_private_because", "private", "public_key", "signature", "signed")
_FINGERPRINT = re.compile(r"[0-9a-f]{4}(:[0-9a-f]{4}){15}")
SIGNED = "SHA256SUMS"


def default_key() -> Path:
    """Where a coordinator's signing key lies unless another place is named."""
    return Path.home() / ".config" / "fedhypevae" / "release-key.pem"


def load_or_make_key(path: Path) -> tuple[Ed25519PrivateKey, bool]:
    """The coordinator's key, made (0600) where there is none.

    Returns:
        The key, and whether it was made now.

    Raises:
        ConfigError: the file is no Ed25519 key, others may read it, or it can't be written.
    """
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            write_new(path, pem, 0o600)
        except OSError as error:
            raise ConfigError(f"can't make a signing key at {path} ({error.strerror}): name another --key") from None
        return key, True
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
        found = serialization.load_pem_private_key(content, None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"the signing key {path} can't be read ({type(error).__name__}): name another --key"
        ) from None
    if mode & 0o077:
        raise ConfigError(f"others may read the signing key {path}: chmod 600 it, or make a new one")
    if not isinstance(found, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key: name another --key")
    return found, False


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of a public key's 32 bytes, in groups of four digits, for people to compare."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    digest = hashlib.sha256(raw).hexdigest()
    return ":".join(digest[at : at + 4] for at in range(0, 64, 4))


def public_pem(key: Ed25519PublicKey) -> str:
    """A public key as PEM text."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def read_pinned(text: str) -> str:
    """The fingerprint that a reader trusts, from itself or from a file with the public key.

    Raises:
        ConfigError: neither.
    """
    if _FINGERPRINT.fullmatch(text.strip().lower()):
        return text.strip().lower()
    try:
        return fingerprint(_public(Path(text).read_text(encoding="ascii")))
    except (OSError, ValueError):
        raise ConfigError(
            f"--key is a fingerprint (16 groups of 4 hexadecimal digits) or a file with a public key, found {text!r}"
        ) from None


def signature_file(key: Ed25519PrivateKey, sums: bytes, not_private_because: Sequence[str]) -> bytes:
    """The content of signature.json: the one canonical form of the signature of SHA256SUMS."""
    return _canonical(
        {
            "algorithm": "Ed25519",
            "not_private_because": list(not_private_because),
            "private": not not_private_because,
            "public_key": public_pem(key.public_key()),
            "signature": base64.b64encode(key.sign(sums)).decode(),
            "signed": SIGNED,
        }
    )


def check_signature(content: bytes, sums: bytes, signer: str | None, pinned: str | None) -> str:
    """Hold signature.json against SHA256SUMS, the signer that the bundle names, and the one that the reader trusts.

    Args:
        content: of signature.json.
        sums: content of SHA256SUMS.
        signer: fingerprint that the bundle's own description names; None where it could not be read.
        pinned: fingerprint that the reader trusts, or None.

    Returns:
        The fingerprint of the key that signed.

    Raises:
        FedHypeVAEError: not in canonical form, a wrong signature, or another's.
    """
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict) or tuple(sorted(fields)) != _FIELDS or _canonical(fields) != content:
            raise ValueError
        key = _public(fields["public_key"])
        if public_pem(key) != fields["public_key"] or (fields["algorithm"], fields["signed"]) != ("Ed25519", SIGNED):
            raise ValueError
        signature = base64.b64decode(fields["signature"], validate=True)
        if base64.b64encode(signature).decode() != fields["signature"]:  # some texts decode to the same bytes
            raise ValueError
    except (ValueError, TypeError, AttributeError, binascii.Error, UnsupportedAlgorithm):
        raise FedHypeVAEError("signature.json was changed: it is not as `fedhypevae release` writes it") from None
    try:
        key.verify(signature, sums)
    except InvalidSignature:
        raise FedHypeVAEError("the signature does not fit SHA256SUMS: one of the two was changed") from None
    found = fingerprint(key)
    if pinned is not None and found != pinned:
        raise FedHypeVAEError(f"signed by {found}, which is not the key that you trust, {pinned}")
    if found != signer:
        raise FedHypeVAEError(f"signed by {found}, but the bundle says that it was made by {signer}")
    return found


def _public(pem: Any) -> Ed25519PublicKey:
    key = serialization.load_pem_public_key(str(pem).encode("ascii"))
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not an Ed25519 key")
    return key


def _canonical(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode()
