"""A whole secure sum in one process, the real protocol without network: for benchmarks and tests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec

from common.secagg import server, site
from common.secagg.messages import Card, Session, cards_to_json, table_to_json
from common.secagg.quantise import Words, pack

PHASES = ("keys", "shares", "check", "masked", "unmask")


@dataclass
class Transcript:
    """What the server saw, and what it cost.

    Attributes:
        cards: of the sites that answered the first exchange.
        boxes: sender -> receiver -> sealed shares. commitments: sender -> holder -> what binds to its shares.
        masked: index -> masked vector.
        revealed: answering site -> owner -> share.
        site_seconds: processor time of each site, all phases together. server_seconds: of the server.
        bytes_up: of one site to the server, the largest. bytes_down: to one site, the largest.
    """

    cards: tuple[Card, ...] = ()
    boxes: dict[int, dict[int, bytes]] = field(default_factory=dict)
    commitments: dict[int, dict[int, bytes]] = field(default_factory=dict)
    masked: dict[int, Words] = field(default_factory=dict)
    revealed: dict[int, dict[int, bytes]] = field(default_factory=dict)
    site_seconds: dict[int, float] = field(default_factory=dict)
    server_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


def secure_sum(
    session: Session,
    signers: Sequence[ec.EllipticCurvePrivateKey],
    values: Sequence[Words],
    bits: int,
    missing: Mapping[str, set[int]] | None = None,
) -> tuple[Words, Transcript]:
    """Run one secure sum over all sites.

    Args:
        session: its assumptions name the number of sites.
        signers: each site's registered key.
        values: each site's (D,) uint64 below 2^b, with its share of the noise.
        bits: b.
        missing: phase of `PHASES` -> sites that fall silent in it, and stay so.

    Returns:
        The sum modulo 2^b of the vectors that arrived, and the transcript.

    Raises:
        ProtocolError: too few sites are left.
    """
    pins = {f"site-{index}": signer.public_key() for index, signer in enumerate(signers)}
    alive, seen, asked = set(range(len(signers))), Transcript(), "task"
    seen.site_seconds = dict.fromkeys(alive, 0.0)
    gone = missing or {}
    clock = time.process_time  # of this process alone, whatever else the machine does

    def leave(phase: str) -> list[int]:
        alive.difference_update(gone.get(phase, set()))
        return sorted(alive)

    own, cards = {}, {}
    for index in leave("keys"):
        start = clock()
        own[index], cards[index] = site.make_keys(session, index, f"site-{index}", signers[index])
        seen.site_seconds[index] += clock() - start
    seen.cards = listed = tuple(cards.values())
    kept: dict[int, dict[int, bytes]] = {}
    for index in leave("shares"):
        start = clock()
        site.check_cards(session, listed, cards[index], pins)
        mine, seen.boxes[index], seen.commitments[index] = site.make_shares(session, own[index], index, listed)
        kept[index] = {index: mine}
        seen.site_seconds[index] += clock() - start
    senders = set(seen.boxes)
    for index in leave("check"):
        start = clock()
        boxes = {sender: boxes[index] for sender, boxes in seen.boxes.items() if sender != index}
        bound = {sender: seen.commitments[sender][index] for sender in boxes}
        kept[index] |= site.open_shares(session, own[index], index, listed, boxes, bound)
        seen.site_seconds[index] += clock() - start
    signatures = {}
    for index in leave("masked"):
        start = clock()
        seen.masked[index] = site.mask(session, own[index], index, listed, senders, values[index], bits)
        signatures[index] = site.sign_masked(session, listed, senders, asked, signers[index])
        seen.site_seconds[index] += clock() - start
    for index in leave("unmask"):
        if index in seen.masked:
            start = clock()
            site.check_survivors(session, index, listed, senders, asked, signatures)
            seen.revealed[index] = site.reveal(kept[index], signatures)
            seen.site_seconds[index] += clock() - start
    start = clock()
    for index, shares in seen.revealed.items():
        server.check_revealed(session, index, shares, seen.masked, seen.commitments)
    total = server.unmask(session, listed, senders, seen.masked, seen.revealed, bits)
    seen.server_seconds = clock() - start
    _count_bytes(seen, signatures, bits)
    return total, seen


def _count_bytes(seen: Transcript, signatures: Mapping[int, bytes], bits: int) -> None:
    """Sizes as they travel: texts of cards, boxes, signatures and shares, and the packed vector."""
    first = min(seen.revealed)
    listed = len(cards_to_json(seen.cards))
    vector = len(pack(seen.masked[first], bits))
    boxes = len(table_to_json(seen.boxes[first])) + len(table_to_json(seen.commitments[first]))
    seen.bytes_up = listed // len(seen.cards) + boxes + vector + len(table_to_json(seen.revealed[first])) + 210
    seen.bytes_down = listed + boxes + len(table_to_json(signatures))
