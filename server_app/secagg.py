"""One secure sum over the sites: five exchanges, as many sites missing as the run assumed, and the sum of the rest.

The server holds no secret. What it gets wrong or lies about, the sites find (`common.secagg`). What it checks itself is
checked as early as can be, to do without a site that lies before the others pay for it. It knows every site by the
index and name under which it met it, and takes nothing for another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import BlameError, ProtocolError
from common.secagg.messages import (
    Card,
    Session,
    cards_from_json,
    cards_to_json,
    check_card,
    check_distinct,
    from_hex,
    indices_from_json,
    table_from_json,
    table_to_json,
)
from common.secagg.quantise import Quantisation, Words, unpack
from common.secagg.server import check_revealed, unmask
from common.secagg.site import is_masked_signed
from common.wire.allow_list import MASKED
from server_app.exchange import Fields
from server_app.faults import Faults
from server_app.members import Member
from server_app.replies import Reply
from server_app.secagg_attempt import Attempt, Send


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


def secure_sum(
    send: Send,
    members: Mapping[int, Member],
    session: Session,
    arguments: Quantisation,
    asked: str,
    faults: Faults,
) -> SecureSum:
    """Ask the sites for the sum of their vectors: one attempt.

    Args:
        send: one exchange with some of them.
        members: all sites of the run, by node.
        session: of this attempt.
        arguments: public arguments of the release.
        asked: digest of what comes with the task (`messages.asked_digest`).
        faults: who is left out; it learns here who else is to be.

    Returns:
        The sum, and whose vectors are in it. One Gaussian release against the server, outsiders and the colluders that
        the run assumes, for adding or removing one unit at any site.

    Raises:
        SumLostError: more sites are missing than assumed, or one sent what can't be right. Nothing of the round is then
            known; the sites that sent a masked vector stay charged for it.
    """
    known = Attempt(send, members, session, faults, faults.left_out(members))
    cards = _collect_cards(known)
    listed = tuple(sorted(cards.values(), key=lambda card: card.index))
    places = {card.index for card in listed}
    replies = known.ask("secagg_shares", {node: {"cards": cards_to_json(listed)} for node in cards}, {})
    boxes, commitments = _collect_boxes(known, _accepted(known, replies, places), places)
    brought = {
        known.nodes[index]: {
            "boxes": table_to_json({other: boxes[other][index] for other in boxes if other != index}),
            "commitments": table_to_json({other: commitments[other][index] for other in boxes if other != index}),
        }
        for index in boxes
    }
    checked = _accepted(known, known.ask("secagg_check", brought, {}), set(boxes))
    known.check(len(checked), "secagg_check")
    replies = known.ask("secagg_masked", {node: {} for node in checked}, {MASKED: (arguments.num_bytes,)})
    signed = _collect_signatures(known, replies, listed, set(boxes), asked)
    masked = {
        index: unpack(replies[known.nodes[index]].tensors[MASKED].numpy().tobytes(), arguments.bits) for index in signed
    }
    survivors = table_to_json(signed)
    replies = known.ask("secagg_unmask", {known.nodes[index]: {"survivors": survivors} for index in signed}, {})
    revealed = _collect_shares(known, replies, set(signed), commitments)
    try:
        total = unmask(known.session, listed, set(boxes), masked, revealed, arguments.bits)
    except BlameError as error:
        for index, why in error.blamed.items():
            known.lied(known.nodes[index], why)
        names = ", ".join(members[known.nodes[index]].name for index in error.blamed)
        raise known.lost(f"{names} sealed shares of another secret; the sum is not known") from None
    except ProtocolError as error:
        raise known.lost(f"{error}; the sum is not known, resume the run to repeat it") from None
    return SecureSum(total, tuple(sorted(known.nodes[index] for index in signed)), known.missing)


def _collect_cards(known: Attempt) -> dict[int, Card]:
    """Cards that other sites can use, each of the site that sent it."""
    cards: dict[int, Card] = {}
    asked: dict[int, Fields] = {node: {} for node in known.members if node not in known.missing}
    known.check(len(asked), "secagg_keys")
    for node, reply in known.ask("secagg_keys", asked, {}).items():
        member = known.members[node]
        try:
            (card,) = cards_from_json(f"[{reply.words.get('card', '')}]", known.session.assumptions.num_sites)
            if (card.index, card.name) != (member.index, member.name):
                raise ProtocolError("it is another site's")
            check_card(known.session, card)
            check_distinct([*cards.values(), card])
        except (ProtocolError, ValueError) as error:
            known.lied(node, f"sent a card that can't be used: {error}")
            continue
        cards[node] = card
    known.check(len(cards), "secagg_keys")
    return cards


def _accepted(known: Attempt, replies: Mapping[int, Reply], sent: set[int]) -> dict[int, Reply]:
    """The replies of sites that can use what all the others sent.

    Raises:
        SumLostError: a site can't use what another sent. Nobody was charged, and the next attempt does without one of
            the two.
    """
    kept, disputes = {}, set()
    for node, reply in replies.items():
        own = known.index(node)
        try:
            refused = indices_from_json(str(reply.words.get("refused", "[]")), known.session.assumptions.num_sites)
            if not refused <= sent - {own}:
                raise ProtocolError("not all of them were sent to it")
        except ProtocolError as error:
            known.lied(node, f"refused what others sent, but {error}")
            continue
        kept[node] = reply
        disputes |= {(own, index) for index in refused}
    if disputes:
        names = {member.index: member.name for member in known.members.values()}
        refusals = "; ".join(f"{names[by]} refuses what {names[of]} sent" for by, of in sorted(disputes))
        known.faults.disputed(known.members.values(), known.session.what, disputes)
        raise known.lost(f"{refusals}; nobody was charged: the log of the site that refuses says why")
    return kept


def _collect_boxes(
    known: Attempt, replies: Mapping[int, Reply], listed: set[int]
) -> tuple[dict[int, dict[int, bytes]], dict[int, dict[int, bytes]]]:
    """Sealed shares of sites that sealed one for each other site, and what binds to them; by the sender's index."""
    boxes, commitments = {}, {}
    for node, reply in replies.items():
        index = known.index(node)
        sealed, bound = _table(known, node, reply, "boxes"), _table(known, node, reply, "commitments")
        if sealed is None or bound is None:
            continue
        if set(sealed) != listed - {index} or set(bound) != listed:
            known.lied(node, "sent sealed shares for other sites than those of the list")
            continue
        boxes[index], commitments[index] = sealed, bound
    known.check(len(boxes), "secagg_shares")
    return boxes, commitments


def _collect_signatures(
    known: Attempt, replies: Mapping[int, Reply], listed: tuple[Card, ...], senders: set[int], asked: str
) -> dict[int, bytes]:
    """Signatures that every other site will accept, by index: a vector with another one is left out of the sum."""
    signed: dict[int, bytes] = {}
    cards = {card.index: card for card in listed}
    for node, reply in replies.items():
        index = known.index(node)
        try:
            signature = from_hex(str(reply.words.get("signature", "")))
            if not is_masked_signed(known.session, cards[index], listed, senders, asked, signature):
                raise ProtocolError("it is not its own, or for another list or task")
        except ProtocolError as error:
            known.lied(node, f"signed its masked vector wrongly: {error}")
            continue
        signed[index] = signature
    known.check(len(signed), "secagg_masked")
    return signed


def _collect_shares(
    known: Attempt,
    replies: Mapping[int, Reply],
    in_sum: set[int],
    commitments: Mapping[int, Mapping[int, bytes]],
) -> dict[int, dict[int, bytes]]:
    """The shares that sites gave, each the one that its owner committed to."""
    revealed: dict[int, dict[int, bytes]] = {}
    for node, reply in replies.items():
        table = _table(known, node, reply, "shares")
        if table is None:
            continue
        try:
            check_revealed(known.session, known.index(node), table, in_sum, commitments)
        except ProtocolError as error:
            known.lied(node, f"sent wrong shares: {error}")
            continue
        revealed[known.index(node)] = table
    known.check(len(revealed), "secagg_unmask")
    return revealed


def _table(known: Attempt, node: int, reply: Reply, word: str) -> dict[int, bytes] | None:
    try:
        return table_from_json(str(reply.words.get(word, "")), known.session.assumptions.num_sites)
    except ProtocolError as error:
        known.lied(node, f"sent {word} that can't be read: {error}")
        return None
