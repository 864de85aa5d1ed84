"""What the sites of one secure sum tell each other through the server, and how it is checked when it arrives.

Everything is bound to one session: run, round, attempt and assumptions. A card, a sealed share or a signature of
another session, or one that was made for another list of keys, fits nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from common.errors import ProtocolError
from common.secagg import primitives
from common.secagg.assumptions import Assumptions

DIGEST_BYTES = 32
_LONGEST_WORD = 400  # characters of a card's field: a registered key has 215
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
        index: in the run, from 0. name: as it is pinned. key: its registered public key, in OpenSSH format.
        box_key: X25519 public key under which shares are sealed.
        mask_key: X25519 public key from which masks are agreed.
        seed_commitment: digest of the seed of the site's own mask.
        signature: over all of this and the session.
    """

    index: int
    name: str
    key: str
    box_key: str
    mask_key: str
    seed_commitment: str
    signature: str

    def signed_part(self, session: Session) -> list[Any]:
        """What the signature covers."""
        return [
            session.binding,
            self.index,
            self.name,
            self.key,
            self.box_key,
            self.mask_key,
            self.seed_commitment,
        ]


def cards_to_json(cards: Iterable[Card]) -> str:
    """Cards as text, in the order of their indices."""
    return json.dumps([asdict(card) for card in sorted(cards, key=lambda card: card.index)])


def cards_from_json(text: str, num_sites: int) -> tuple[Card, ...]:
    """Cards as they arrived: of the right form, in order, no two of one index, name or key; see `check_card`.

    Raises:
        ProtocolError: anything else.
    """
    cards = []
    for value in _list(text, num_sites, "cards"):
        if not isinstance(value, dict) or set(value) != set(Card.__dataclass_fields__):
            raise ProtocolError("a card has other fields than expected")
        index, words = value["index"], {name: value[name] for name in value if name != "index"}
        if not _is_index(index, num_sites) or not all(_is_word(word) for word in words.values()):
            raise ProtocolError("a card has a field of the wrong type, one too long, or an index out of range")
        cards.append(Card(index, **words))
    ordered = tuple(sorted(cards, key=lambda card: card.index))
    check_distinct(ordered)
    return ordered


def check_distinct(cards: Sequence[Card]) -> None:
    """Refuse two cards of one index, name or key (ProtocolError)."""
    for field in ("index", "name", "key", "box_key", "mask_key", "seed_commitment"):
        if len({getattr(card, field) for card in cards}) != len(cards):
            raise ProtocolError(f"two cards have the same {field}")


def check_card(session: Session, card: Card) -> None:
    """Refuse a card that another site could not use, or that the key it names did not sign for this session.

    Whether that key is the site's own is for those to say who pinned it.

    Raises:
        ProtocolError: says which.
    """
    for key in (card.box_key, card.mask_key):
        primitives.check_public(from_hex(key))
    if len(from_hex(card.seed_commitment)) != DIGEST_BYTES:
        raise ProtocolError("its card has a commitment of the wrong length")
    public = primitives.load_public(card.key)
    if primitives.public_line(public) != card.key:
        raise ProtocolError("its card has a registered key in another form than ours")
    if not primitives.is_signed(public, from_hex(card.signature), "card", card.signed_part(session)):
        raise ProtocolError("its card is not signed by the key that it names, for this session")


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


def indices_to_json(indices: Iterable[int]) -> str:
    """Distinct indices, as text."""
    return json.dumps(sorted(indices))


def indices_from_json(text: str, num_sites: int) -> frozenset[int]:
    """The inverse of `indices_to_json`.

    Raises:
        ProtocolError: anything else.
    """
    values = _list(text, num_sites, "indices")
    if not all(_is_index(value, num_sites) for value in values) or len(set(values)) != len(values):
        raise ProtocolError("a list of sites has an index that is double or out of range")
    return frozenset(values)


def from_hex(text: str) -> bytes:
    """Bytes from hexadecimal digits, small letters alone: one text for the same bytes. Raises ProtocolError."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        raise ProtocolError("expected hexadecimal digits") from None
    if value.hex() != text:
        raise ProtocolError("expected hexadecimal digits in small letters, without spaces")
    return value


def asked_digest(round_index: int, tensors: Mapping[str, Tensor]) -> str:
    """Digest of what came with a task: all sites of a sum must have had the same.

    Args:
        round_index: 0, 1, ...; -1 outside the rounds.
        tensors: the parameters that the sites hold in this round; none for statistics.
    """
    parts = [
        [name, list(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()]
        for name, value in sorted(tensors.items())
    ]
    return primitives.digest("asked", [round_index, parts])


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


def _is_word(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_WORD


def _is_index(value: object, num_sites: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_sites
