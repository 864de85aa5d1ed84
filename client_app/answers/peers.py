"""The site's registered key and the list of peers that it pinned: what keeps a server from posing as other sites.

A deployed site has `keys/node`, the key by which its server knows it, and `peers.json`, names and public keys of all
sites of the federation, itself included, which its people got and compared outside the server's reach. The simulated
sites of one machine make keys of their own and read each other's folders.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client_app.place import Place
from common.durable import PUBLISHED, write_atomically
from common.errors import ConfigError, ProtocolError
from common.secagg.primitives import load_public, load_signer, new_node_key
from common.texts import read_json

PEERS_FILE = "peers.json"


def own_signer(place: Place) -> ec.EllipticCurvePrivateKey:
    """The site's registered key.

    Raises:
        ConfigError: there is none, or it can't be read.
    """
    path = _key_path(place.folder)
    if place.position >= 0 and not path.exists():
        _make_simulated_key(path)
    try:
        return load_signer(path.read_bytes())
    except (OSError, ProtocolError) as error:
        raise ConfigError(f"trust secagg needs the site's node key at {path}: {error}") from None


def pinned_peers(place: Place) -> dict[str, ec.EllipticCurvePublicKey]:
    """Names and public keys of all sites of the federation, this one included.

    Raises:
        ConfigError: no list, one that can't be read, with one key twice, or without this site's own name and key.
    """
    if place.position >= 0:
        lines = {
            path.parents[1].name: path.read_text(encoding="utf-8")
            for path in sorted(place.folder.parent.glob("*/keys/node.pub"))
        }
    else:
        lines = _read_list(place.folder / PEERS_FILE)
    try:
        pins = {name: load_public(line) for name, line in lines.items()}
    except ProtocolError as error:
        raise ConfigError(f"the list of peers can't be used: {error}") from None
    if len({_raw(key) for key in pins.values()}) != len(pins):
        raise ConfigError("the list of peers has one key under two names")
    own = pins.get(place.name)
    if own is None or _raw(own) != _raw(own_signer(place).public_key()):
        raise ConfigError(f"the list of peers does not hold this site's own name {place.name!r} with its own key")
    return pins


def _key_path(folder: Path) -> Path:
    return folder / "keys" / "node"


def _read_list(path: Path) -> dict[str, str]:
    try:
        lines = read_json(path)
    except OSError as error:
        raise ConfigError(
            f"trust secagg needs {path} ({error.strerror}): the names and public keys of all sites, compared by people"
        ) from None
    if not isinstance(lines, dict) or not all(isinstance(line, str) for line in lines.values()):
        raise ConfigError(f'{path} must be one object of site names and public keys: {{"site-1": "ecdsa-sha2-... "}}')
    return lines


def _make_simulated_key(path: Path) -> None:
    private, public = new_node_key()
    write_atomically(path, private, mode=0o600)
    write_atomically(path.with_suffix(".pub"), public, mode=PUBLISHED)


def _raw(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
