"""The well-kept primitives that secure aggregation is made of, each with one use: `cryptography` does the work.

X25519 and HKDF-SHA256 agree on keys, AES-256-GCM carries shares from site to site through the server, ChaCha20 turns a
32-byte seed into a mask, and ECDSA on P-384, the curve of the sites' registered node keys, signs.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import ProtocolError
from common.secagg.quantise import Words, reduce_bits

_DOMAIN = b"fedhypevae/secagg/1/"
_FIELD = 2**255 - 19  # of X25519
_NONCE = bytes(12)  # every AES key below seals one message only


def canonical(content: Any) -> bytes:
    """The one text of JSON values that is signed, hashed or bound to a ciphertext."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(purpose: str, content: Any) -> str:
    """SHA-256 of JSON values under a purpose, hexadecimal."""
    return hashlib.sha256(_DOMAIN + purpose.encode() + b"\0" + canonical(content)).hexdigest()


def new_key() -> bytes:
    """A fresh X25519 private key, 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """The public half of an X25519 key, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def check_public(public: bytes) -> None:
    """Refuse a public key with which no secret can be agreed, or a second way to write one.

    X25519 takes any 32 bytes. The points of small order, on the curve and on its twist, give the secret zero to every
    private key: tried here with a fresh one. Numbers of 2^255 - 19 and above name a point that a smaller number names
    already (RFC 7748, section 5).

    Raises:
        ProtocolError: such a key, or not 32 bytes.
    """
    if len(public) != 32 or int.from_bytes(public, "little") >= _FIELD:
        raise ProtocolError("a site's key can't be used: it is not 32 bytes, or not the one way to write its point")
    agree(new_key(), public, "check", "")


def agree(private: bytes, public: bytes, purpose: str, binding: str) -> bytes:
    """32 bytes that only the two key holders know, bound to a purpose and a text.

    Raises:
        ProtocolError: the public key is no key, or one that makes every secret the same.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ProtocolError("a site's key can't be used: no key can be agreed with it") from None
    info = _DOMAIN + purpose.encode() + b"\0" + binding.encode()
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared)


def seal(key: bytes, plain: bytes, bound: bytes) -> bytes:
    """Encrypt and authenticate one message under a key that is never used again."""
    return AESGCM(key).encrypt(_NONCE, plain, bound)


def unseal(key: bytes, box: bytes, bound: bytes) -> bytes:
    """What `seal` was given.

    Raises:
        ProtocolError: the box was changed, or was made under another key or for another place.
    """
    try:
        return AESGCM(key).decrypt(_NONCE, box, bound)
    except InvalidTag:
        raise ProtocolError("a sealed share was changed, or was made for another list of keys, round or site") from None


def expand(seed: bytes, size: int, bits: int) -> Words:
    """A 32-byte seed as `size` numbers below 2^b: ChaCha20's key stream. Each seed is used once."""
    # eight bytes a number, whatever b: cutting bits off costs less than spreading bytes out
    stream = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(8 * size))
    return reduce_bits(np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False), bits)


def commitment(seed: bytes) -> bytes:
    """What binds a site to its 32 random bytes without telling them."""
    return hashlib.sha256(_DOMAIN + b"seed\0" + seed).digest()


def sign(signer: ec.EllipticCurvePrivateKey, purpose: str, content: Any) -> bytes:
    """Signature of JSON values under a purpose, with a site's registered key."""
    return signer.sign(_DOMAIN + purpose.encode() + b"\0" + canonical(content), ec.ECDSA(hashes.SHA384()))


def is_signed(public: ec.EllipticCurvePublicKey, signature: bytes, purpose: str, content: Any) -> bool:
    """Whether the holder of a registered key signed these values under this purpose."""
    try:
        public.verify(signature, _DOMAIN + purpose.encode() + b"\0" + canonical(content), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def public_line(public: ec.EllipticCurvePublicKey) -> str:
    """A registered public key in OpenSSH format, without a comment: one text for one key."""
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def new_node_key() -> tuple[bytes, bytes]:
    """A new registered key, in OpenSSH format: the private half, and the public one as a line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return private, public_line(key.public_key()).encode() + b"\n"


def load_signer(content: bytes) -> ec.EllipticCurvePrivateKey:
    """A site's own registered key, in OpenSSH format.

    Raises:
        ProtocolError: it is none; nothing of the content is quoted.
    """
    try:
        key = serialization.load_ssh_private_key(content, None)
    except ValueError:
        raise ProtocolError("the site's node key can't be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ProtocolError("the site's node key is not ECDSA P-384")
    return key


def load_public(line: str) -> ec.EllipticCurvePublicKey:
    """A registered public key, in OpenSSH format.

    Raises:
        ProtocolError: it is none.
    """
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ProtocolError(f"not a public key in OpenSSH format: {line!r:.60}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ProtocolError(f"not an ECDSA P-384 key: {line!r:.60}")
    return key
