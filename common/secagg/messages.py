"""What the sites of one secure sum tell each other through the server, and how it is checked when it arrives.

Everything is bound to one session: run, round, attempt and assumptions. A card, a sealed share or a signature of
another session, or one that was made for another list of keys, fits nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import ProtocolError
from common.secagg import primitives
from common.secagg.assumptions import Assumptions

_KEY_BYTES = 32
_LONGEST = 50_000_000  # characters of one list


@dataclass(frozen=True)
class Session:
    """One attempt at one secure sum; all of it public, and the same at every site.

    Attributes:
        run: lasting name of the run. what: the round's name in it.
        attempt: drawn by the server for this attempt alone, 32 hexadecimal digits.
        context: digest of the run's public context.
        assumptions: sites, dropouts, colluders.
    """

    run: str
    what: str
    attempt: str
    context: str
    assumptions: Assumptions

    @property
    def binding(self) -> str:
        """Digest that ties keys, ciphertexts and signatures to this session."""
        return primitives.digest("session", asdict(self))


@dataclass(frozen=True)
class Card:
    """What a site shows of itself for one session, signed with its registered key.

    Attributes:
        index: in the run, from 0. name: as it is pinned.
        box_key: X25519 public key under which shares are sealed.
        mask_key: X25519 public key from which masks are agreed.
        seed_commitment: digest of the seed of the site's own mask.
        signature: over all of this and the session.
    """

    index: int
    name: str
    box_key: str
    mask_key: str
    seed_commitment: str
    signature: str

    def signed_part(self, session: Session) -> list[Any]:
        """What the signature covers."""
        return [session.binding, self.index, self.name, self.box_key, self.mask_key, self.seed_commitment]


def cards_to_json(cards: Iterable[Card]) -> str:
    """Cards as text, in the order of their indices."""
    return json.dumps([asdict(card) for card in sorted(cards, key=lambda card: card.index)])


def cards_from_json(text: str, num_sites: int) -> tuple[Card, ...]:
    """Cards as they arrived: of the right form, in order, no two of one index, name or key; signatures not yet checked.

    Raises:
        ProtocolError: anything else.
    """
    cards = []
    for value in _list(text, num_sites, "cards"):
        if not isinstance(value, dict) or set(value) != set(Card.__dataclass_fields__):
            raise ProtocolError("a card has other fields than expected")
        index, words = value["index"], {name: value[name] for name in value if name != "index"}
        if not _is_index(index, num_sites) or not all(isinstance(word, str) for word in words.values()):
            raise ProtocolError("a card has a field of the wrong type or an index out of range")
        card = Card(index, **words)
        for key in (card.box_key, card.mask_key, card.seed_commitment):
            if len(from_hex(key)) != _KEY_BYTES:
                raise ProtocolError("a card has a key of the wrong length")
        cards.append(card)
    ordered = tuple(sorted(cards, key=lambda card: card.index))
    for field in ("index", "name", "box_key", "mask_key", "seed_commitment"):
        if len({getattr(card, field) for card in ordered}) != len(ordered):
            raise ProtocolError(f"two cards have the same {field}")
    return ordered


def check_signed(session: Session, cards: Sequence[Card], pins: Mapping[str, ec.EllipticCurvePublicKey]) -> None:
    """Refuse a list that holds a site which is not pinned, or a card that its site did not sign for this session.

    Raises:
        ProtocolError: names the first such site.
    """
    for card in cards:
        pinned = pins.get(card.name)
        if pinned is None:
            raise ProtocolError(f"site {card.name!r:.60} is not in this site's list of peers")
        if not primitives.is_signed(pinned, from_hex(card.signature), "card", card.signed_part(session)):
            raise ProtocolError(f"the card of {card.name} is not signed by its registered key for this session")


def list_digest(cards: Sequence[Card]) -> str:
    """Digest of a whole list of cards."""
    return primitives.digest("cards", [asdict(card) for card in cards])


def table_to_json(table: Mapping[int, bytes]) -> str:
    """index -> bytes, as text."""
    return json.dumps([[index, value.hex()] for index, value in sorted(table.items())])


def table_from_json(text: str, num_sites: int) -> dict[int, bytes]:
    """The inverse of `table_to_json`.

    Raises:
        ProtocolError: not a table of distinct indices below `num_sites`.
    """
    table: dict[int, bytes] = {}
    for pair in _list(text, num_sites, "entries"):
        if not isinstance(pair, list) or len(pair) != 2 or not _is_index(pair[0], num_sites) or pair[0] in table:
            raise ProtocolError("a table has an entry that is no pair, is double or out of range")
        if not isinstance(pair[1], str):
            raise ProtocolError("a table has an entry that is no text")
        table[pair[0]] = from_hex(pair[1])
    return table


def indices_from_json(text: str, num_sites: int) -> frozenset[int]:
    """A list of distinct indices.

    Raises:
        ProtocolError: anything else.
    """
    values = _list(text, num_sites, "indices")
    if not all(_is_index(value, num_sites) for value in values) or len(set(values)) != len(values):
        raise ProtocolError("a list of sites has an index that is double or out of range")
    return frozenset(values)


def from_hex(text: str) -> bytes:
    """Bytes from hexadecimal digits. Raises ProtocolError if they are none."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise ProtocolError("expected hexadecimal digits") from None


def _list(text: str, most: int, what: str) -> list[Any]:
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ProtocolError(f"a list of {what} is too long or no text")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError(f"a list of {what} can't be read") from None
    if not isinstance(values, list) or len(values) > most:
        raise ProtocolError(f"expected a list of at most {most} {what}")
    return values


def _is_index(value: object, num_sites: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_sites
