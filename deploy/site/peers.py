"""The list of the federation's sites that a site pins for secure aggregation: names and public node keys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from client_app.answers.peers import PEERS_FILE
from common.durable import write_atomically
from common.errors import ConfigError
from deploy.machine.keys import fingerprint
from deploy.site.folder import SiteFolder


def read_pairs(pairs: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE words as a mapping.

    Raises:
        ConfigError: a word of another form, or a name twice.
    """
    found: dict[str, Path] = {}
    for pair in pairs:
        name, sign, path = pair.partition("=")
        if not sign or not name or not path:
            raise ConfigError(f"expected NAME=FILE.pub, found {pair!r}")
        if name in found:
            raise ConfigError(f"site {name} is named twice")
        found[name] = Path(path)
    return found


def pin_peers(site: SiteFolder, others: Mapping[str, Path]) -> dict[str, str]:
    """Write peers.json: the other sites' public keys and this site's own.

    Args:
        site: the site that pins.
        others: name -> public key file, as the other sites gave them.

    Returns:
        Name -> fingerprint, for people to compare.

    Raises:
        ConfigError: a file is no public node key, a key is there twice, or this site is among the others.
    """
    own = site.settings.name
    if own in others:
        raise ConfigError(f"{own} is this site itself: name the others only")
    paths = {**others, own: site.node_key.with_suffix(".pub")}
    shown = {name: fingerprint(path) for name, path in sorted(paths.items())}
    if len(set(shown.values())) != len(shown):
        raise ConfigError("two of the sites have one key: each makes its own with `fedhypevae site init`")
    lines = {name: paths[name].read_text(encoding="utf-8").strip() for name in shown}
    write_atomically(site.path / PEERS_FILE, (json.dumps(lines, indent=2) + "\n").encode(), mode=0o600)
    return shown
