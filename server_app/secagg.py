"""One secure sum over the sites: four exchanges, as many sites missing as the run assumed, and the sum of the rest.

The server holds no secret and checks no signature: what it gets wrong or lies about, the sites find (`common.secagg`).
It knows every site by the index and name under which it met it, and takes nothing for another's.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.serverapp import Grid

from common.errors import FederationError, ProtocolError
from common.methods.base import Shapes, Tensors
from common.secagg.messages import (
    Card,
    Session,
    cards_from_json,
    cards_to_json,
    from_hex,
    table_from_json,
    table_to_json,
)
from common.secagg.quantise import Quantisation, Words, unpack
from common.secagg.server import unmask
from common.wire import MASKED, Kind
from server_app.charges import NO_CHARGES, Charges
from server_app.downlink import Member, Parcel
from server_app.exchange import Outcome, build_messages, exchange
from server_app.replies import Reply

SiteWords = Mapping[str, str | int | float]
_NOTHING: Tensors = {}


class Send(Protocol):
    """One exchange with some sites: kind, words of each, allowed tensors of a reply."""

    def __call__(self, kind: Kind, words: Mapping[int, SiteWords], shapes: Shapes) -> Outcome:
        """Send and collect."""
        ...


@dataclass(frozen=True)
class SecureSum:
    """A sum of several sites, and nothing of any one of them.

    Attributes:
        total: (D,) uint64, modulo 2^b.
        nodes: whose vectors are in it.
        missing: node -> why it fell out, or did not help to unmask.
    """

    total: Words
    nodes: tuple[int, ...]
    missing: Mapping[int, str]


@dataclass
class _Exchanges:
    """The exchanges of one attempt: who is still there, and why the others are not."""

    send: Send
    members: Mapping[int, Member]
    session: Session
    extra: SiteWords
    missing: dict[int, str] = field(default_factory=dict)

    def ask(self, kind: Kind, words: Mapping[int, SiteWords], shapes: Shapes) -> Mapping[int, Reply]:
        """Replies by node; FederationError if too few are left."""
        common: dict[str, str | int | float] = {**self.extra}
        common |= {"what": self.session.what, "attempt": self.session.attempt}
        told = {node: {**common, **own} for node, own in words.items()}
        outcome = self.send(kind, told, shapes)
        self.missing |= outcome.missing
        self.check(len(outcome.replies), kind)
        return outcome.replies

    def check(self, left: int, kind: Kind) -> None:
        """Refuse to go on with fewer sites than hide and noise each other."""
        assumed = self.session.assumptions
        if left < assumed.threshold:
            reasons = "; ".join(f"{self.members[node].name} {why}" for node, why in sorted(self.missing.items()))
            raise FederationError(
                f"{self.session.what}: {left} of {assumed.num_sites} sites are left after {kind}, secure aggregation "
                f"bears {assumed.dropouts} missing ({reasons}); nothing was unmasked: mend them, then resume the run"
            )

    def drop(self, node: int, why: str) -> None:
        """Go on without a site."""
        self.missing[node] = why


def sender(
    grid: Grid,
    group: str,
    common: Callable[[int], SiteWords],
    timeout: float,
    note: Callable[[Kind, Outcome], None],
    parcel: Callable[[int, bool], Parcel] | None = None,
    charges: Charges = NO_CHARGES,
) -> Send:
    """How `secure_sum` sends: each site's own words and those of the exchange, one timeout for each exchange.

    Args:
        grid: the link to the sites.
        group: name of the round, for Flower.
        common: what every message to a site says.
        timeout: seconds to wait for replies.
        note: told of every exchange.
        parcel: (node, whether the whole) -> the parameters that come with the task; all sites must get the same.
        charges: what a site can have been charged in this run.
    """

    def once(kind: Kind, words: Mapping[int, SiteWords], shapes: Shapes, nodes: Iterable[int], whole: bool) -> Outcome:
        carried = {} if parcel is None or kind != "secagg_masked" else {node: parcel(node, whole) for node in nodes}
        messages = build_messages(
            kind,
            nodes,
            lambda node: {**common(node), **words[node], **(carried[node].words if carried else {})},
            lambda node: carried[node].tensors if carried else _NOTHING,
            group,
            timeout,
        )
        return exchange(grid, kind, messages, timeout, lambda _: shapes, charges=charges)

    def send(kind: Kind, words: Mapping[int, SiteWords], shapes: Shapes) -> Outcome:
        outcome = once(kind, words, shapes, list(words), False)
        if outcome.stale:
            outcome = outcome.then(once(kind, words, shapes, sorted(outcome.stale), True))
        note(kind, outcome)
        return outcome

    return send


def secure_sum(
    send: Send,
    members: Mapping[int, Member],
    session: Callable[[str], Session],
    arguments: Quantisation,
    extra: SiteWords,
) -> SecureSum:
    """Ask the sites for the sum of their vectors.

    Args:
        send: one exchange with some of them.
        members: all sites of the run, by node.
        session: attempt's name -> session.
        arguments: public arguments of the release.
        extra: further words of every message.

    Returns:
        The sum, and whose vectors are in it. One Gaussian release against the server, outsiders and the colluders that
        the run assumes, for adding or removing one unit at any site.

    Raises:
        FederationError: more sites are missing than assumed, or one sent shares that can't be right. Nothing of the
            round is then known; the sites that sent a masked vector stay charged for it.
    """
    known = _Exchanges(send, members, session(secrets.token_hex(16)), extra)
    nodes = {member.index: node for node, member in members.items()}
    cards = _collect_cards(known)
    listed = cards_to_json(cards.values())
    replies = known.ask("secagg_shares", {node: {"cards": listed} for node in cards}, {})
    boxes = _collect_boxes(known, replies, {cards[node].index for node in cards})
    brought = {
        node: {
            "boxes": table_to_json(
                {members[other].index: boxes[other][members[node].index] for other in boxes if other != node}
            )
        }
        for node in boxes
    }
    replies = known.ask("secagg_masked", brought, {MASKED: (arguments.num_bytes,)})
    masked = {
        members[node].index: unpack(reply.tensors[MASKED].numpy().tobytes(), arguments.bits)
        for node, reply in replies.items()
    }
    signed = _collect_signatures(known, replies)
    survivors = table_to_json(signed)
    replies = known.ask("secagg_unmask", {nodes[index]: {"survivors": survivors} for index in signed}, {})
    revealed = _collect_shares(known, replies)
    try:
        total = unmask(
            known.session,
            tuple(cards.values()),
            [members[node].index for node in boxes],
            {index: masked[index] for index in signed},
            revealed,
            arguments.bits,
        )
    except ProtocolError as error:
        raise FederationError(
            f"{known.session.what}: {error}; the sum is not known, resume the run to repeat it"
        ) from None
    return SecureSum(total, tuple(sorted(nodes[index] for index in signed)), known.missing)


def _collect_cards(known: _Exchanges) -> dict[int, Card]:
    """Cards that name the site that sent them."""
    cards: dict[int, Card] = {}
    for node, reply in known.ask("secagg_keys", {node: {} for node in known.members}, {}).items():
        member = known.members[node]
        try:
            (card,) = cards_from_json(f"[{reply.words.get('card', '')}]", known.session.assumptions.num_sites)
            if (card.index, card.name) != (member.index, member.name):
                raise ProtocolError("its card is another site's")
            cards_from_json(cards_to_json([*cards.values(), card]), known.session.assumptions.num_sites)
        except (ProtocolError, ValueError) as error:
            known.drop(node, f"sent a card that can't be used: {error}")
            continue
        cards[node] = card
    known.check(len(cards), "secagg_keys")
    return cards


def _collect_boxes(known: _Exchanges, replies: Mapping[int, Reply], listed: set[int]) -> dict[int, dict[int, bytes]]:
    """Sealed shares of sites that sealed one for each other site."""
    boxes: dict[int, dict[int, bytes]] = {}
    for node, reply in replies.items():
        table = _table(known, node, reply, "boxes")
        if table is not None and set(table) == listed - {known.members[node].index}:
            boxes[node] = table
        else:
            known.drop(node, "sent sealed shares that can't be used")
    known.check(len(boxes), "secagg_shares")
    return boxes


def _collect_signatures(known: _Exchanges, replies: Mapping[int, Reply]) -> dict[int, bytes]:
    signed: dict[int, bytes] = {}
    for node, reply in replies.items():
        try:
            signed[known.members[node].index] = from_hex(str(reply.words.get("signature", "")))
        except ProtocolError:
            known.drop(node, "sent a signature that can't be read")
    known.check(len(signed), "secagg_masked")
    return signed


def _collect_shares(known: _Exchanges, replies: Mapping[int, Reply]) -> dict[int, dict[int, bytes]]:
    revealed: dict[int, dict[int, bytes]] = {}
    for node, reply in replies.items():
        table = _table(known, node, reply, "shares")
        if table is not None:
            revealed[known.members[node].index] = table
    known.check(len(revealed), "secagg_unmask")
    return revealed


def _table(known: _Exchanges, node: int, reply: Reply, word: str) -> dict[int, bytes] | None:
    try:
        return table_from_json(str(reply.words.get(word, "")), known.session.assumptions.num_sites)
    except ProtocolError as error:
        known.drop(node, f"sent {word} that can't be read: {error}")
        return None
