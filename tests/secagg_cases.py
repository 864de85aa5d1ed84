"""Federations whose sites have keys and know each other's: what tests of `trust = "secagg"` start from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Message

from deploy.machine.keys import make_node_key
from tests.harness import Federation, Handler, HarnessSite

Tamper = Callable[[HarnessSite, Message, Handler], Message | None]
PHASES = ("secagg_keys", "secagg_shares", "secagg_check", "secagg_masked", "secagg_unmask")
SHARED: dict[str, Any] = {"trust": "secagg", "num_rounds": 2}
# A federation without statistics: half the messages.
ROUNDS_ONLY: dict[str, Any] = {"statistics_share": 0.0, "public_total": 150}


def keyed_federation(home: Path, num_sites: int = 4, **options: Any) -> Federation:
    """Sites with node keys and each other's in peers.json, whose policies allow both trusts."""
    federation = Federation.create(home, num_sites, **{"allowed_trust": ("local", "secagg"), **options})
    peers = {}
    for site in federation.sites:
        make_node_key(site.folder / "keys" / "node")
        peers[site.name] = (site.folder / "keys" / "node.pub").read_text(encoding="utf-8")
    for site in federation.sites:
        (site.folder / "peers.json").write_text(json.dumps(peers), encoding="utf-8")
    return federation


def phase_of(message: Message) -> str:
    """Which exchange a message belongs to."""
    return str(message.metadata.message_type).removeprefix("query.")


def silent(when: set[tuple[str, str, str]]) -> Tamper:
    """Sites that never answer: (site, round's name, phase)."""

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        words = message.content.config_records["words"]
        if (site.name, str(words.get("what", "")), phase_of(message)) in when:
            return None
        return handler()

    return tamper
