"""A site's side of one secure sum: five answers, as pure functions over what the site keeps between them.

1. keys: a card with two fresh public keys and a commitment, signed (`make_keys`);
2. shares: the list of cards is checked against the pinned keys; the mask key and the seed of the site's own mask are
   shared among all, each share sealed for its receiver, and committed to before all (`check_cards`, `make_shares`);
3. check: the shares of the others are opened and held against their commitments (`open_shares`);
4. masked sum: the vector leaves under one mask for each other site and one of its own (`mask`, `sign_masked`);
5. unmasking: a share of a site's mask seed if it sent its vector, else of its mask key (`check_survivors`, `reveal`).

A server learns no more than the sum, since a site refuses too short a list, keys other than the pinned ones, shares
made for another list, a list of senders that the others did not have, and a second answer to 5.

**What a site that lies costs the others.** All that comes from another site and can be wrong for itself is known before
4, where records are read and charged: a card or a box that can't be used is named in answer 2 or 3, the attempt ends
there, and the next one does without the liar or without whom it slanders (`disputes`). After 4 a lie costs its author
its place in the sum (a signature) or in the unmasking (a share that is not the committed one), as silence would. Two
lies are left that cost a sum: shares, committed to, of another secret than the card's, which names its author; and a
vector of random numbers, which shows in the norm of the sum and names nobody.

**Why nothing is used twice.** Another attempt draws new keys, seeds, noise and a new sample, and is charged as a new
release. The same noised vector, masked again, would cost nothing more only if the server saw no other sum of it. A site
can't know whether the others unmasked the first one: the two sums would differ by the vector of the site that lied or
fell silent in between, under its share of the noise alone. Before answer 4 nothing is drawn that could be kept.

Source: Bonawitz et al. (2017), figure 4, for a server that is not honest. Departs: no round makes all survivors' lists
agree, since the noise is enough without it (see `assumptions`); the check (3) and the commitments are added.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import BlameError, ProtocolError
from common.secagg import primitives
from common.secagg.messages import Card, Session, check_card, from_hex, list_digest
from common.secagg.quantise import Words, reduce_bits
from common.secagg.shamir import SHARE_BYTES, split_secret

_BOX_BYTES = 2 * SHARE_BYTES + 16  # two shares and AES-GCM's tag


@dataclass(frozen=True)
class Secrets:
    """What a site draws for one session; it never leaves the site whole, and is erased with the session."""

    box_key: bytes
    mask_key: bytes
    seed: bytes


def make_keys(session: Session, index: int, name: str, signer: ec.EllipticCurvePrivateKey) -> tuple[Secrets, Card]:
    """Fresh keys for one session, and the signed card that shows their public halves."""
    own = Secrets(primitives.new_key(), primitives.new_key(), secrets.token_bytes(32))
    unsigned = Card(
        index,
        name,
        primitives.public_line(signer.public_key()),
        primitives.public_key(own.box_key).hex(),
        primitives.public_key(own.mask_key).hex(),
        primitives.commitment(own.seed).hex(),
        "",
    )
    signature = primitives.sign(signer, "card", unsigned.signed_part(session)).hex()
    return own, Card(**{**unsigned.__dict__, "signature": signature})


def check_cards(
    session: Session, cards: Sequence[Card], own: Card, pins: Mapping[str, ec.EllipticCurvePublicKey]
) -> None:
    """Refuse a list of cards that is too short, lacks this site's own, or is not signed by pinned keys.

    Raises:
        BlameError: the cards of these sites can't be used. ProtocolError: the list can't. Nothing was charged.
    """
    least = session.assumptions.threshold
    if len(cards) < least:
        raise ProtocolError(f"the server lists {len(cards)} sites, at least {least} must take part")
    if own not in cards:
        raise ProtocolError("the server's list does not hold this site's own card")
    blamed = {}
    for card in cards:
        try:
            check_card(session, card)
            if card.name not in pins:
                raise ProtocolError("it is not in this site's list of peers")
            if card.key != primitives.public_line(pins[card.name]):
                raise ProtocolError("it has another key in this site's list of peers")
        except ProtocolError as error:
            blamed[card.index] = str(error)
    if blamed:
        raise BlameError(blamed)


def make_shares(
    session: Session, own: Secrets, index: int, cards: Sequence[Card]
) -> tuple[bytes, dict[int, bytes], dict[int, bytes]]:
    """Share both secrets among all listed sites.

    Args:
        session: the session.
        own: this site's secrets.
        index: this site's index.
        cards: the checked list.

    Returns:
        This site's own two shares, which it keeps; receiver's index -> sealed shares; and holder's index -> what binds
        to both of its shares. To be made once: a second set of shares would be another polynomial.
    """
    places = [card.index + 1 for card in cards]
    seeds = split_secret(own.seed, session.assumptions.threshold, places)
    keys = split_secret(own.mask_key, session.assumptions.threshold, places)
    both = {card.index: seeds[card.index + 1] + keys[card.index + 1] for card in cards}
    listed = list_digest(cards)
    boxes = {}
    for card in cards:
        if card.index != index:
            key = _box_key(session, own.box_key, from_hex(card.box_key), listed, index, card.index)
            boxes[card.index] = primitives.seal(key, both[card.index], listed.encode())
    return both[index], boxes, {holder: commit(session, index, holder, shares) for holder, shares in both.items()}


def commit(session: Session, owner: int, holder: int, both: bytes) -> bytes:
    """What binds to a pair of shares without telling them: 32 bytes for the seed's, 32 for the key's.

    A share by itself is uniform over 2^256 numbers to anybody who holds fewer than the threshold: it hides itself.
    """
    return b"".join(
        commit_share(session, owner, holder, share, is_seed=is_seed)
        for share, is_seed in ((both[:SHARE_BYTES], True), (both[SHARE_BYTES:], False))
    )


def commit_share(session: Session, owner: int, holder: int, share: bytes, *, is_seed: bool) -> bytes:
    """One half of `commit`."""
    part = [session.binding, owner, holder, "seed" if is_seed else "key", share.hex()]
    return bytes.fromhex(primitives.digest("share", part))


def open_shares(
    session: Session,
    own: Secrets,
    index: int,
    cards: Sequence[Card],
    boxes: Mapping[int, bytes],
    commitments: Mapping[int, bytes],
) -> dict[int, bytes]:
    """Open what the other sites sealed for this one.

    Args:
        session: the session.
        own: this site's secrets.
        index: this site's index.
        cards: the list that this site shared its own secrets among.
        boxes: sender's index -> sealed shares, as the server brought them.
        commitments: sender's index -> what it committed to before all for this site (`commit`).

    Returns:
        Sender's index -> its two shares for this site.

    Raises:
        BlameError: the boxes of these senders do not open (they were changed, or sealed for another list of cards), or
            hold other shares than were committed to. ProtocolError: too few senders, or one that is not listed. Nothing
            was charged.
    """
    known = {card.index: card for card in cards}
    least = session.assumptions.threshold
    if index in boxes or not set(boxes) <= set(known) or set(boxes) != set(commitments):
        raise ProtocolError("the server brings shares of sites that are not on its own list")
    if len(boxes) + 1 < least:
        raise ProtocolError(f"shares of {len(boxes) + 1} sites, at least {least} must take part")
    listed, opened, blamed = list_digest(cards), {}, {}
    for sender, box in sorted(boxes.items()):
        key = _box_key(session, own.box_key, from_hex(known[sender].box_key), listed, sender, index)
        try:
            if len(box) != _BOX_BYTES:
                raise ProtocolError("its sealed shares have the wrong length")
            opened[sender] = primitives.unseal(key, box, listed.encode())
            if commit(session, sender, index, opened[sender]) != commitments[sender]:
                raise ProtocolError("its shares for this site are not those that it committed to")
        except ProtocolError as error:
            blamed[sender] = str(error)
    if blamed:
        raise BlameError(blamed)
    return opened


def mask(
    session: Session, own: Secrets, index: int, cards: Sequence[Card], senders: Iterable[int], values: Words, bits: int
) -> Words:
    """A vector under a mask of its own and one for each other sender, which cancels in the sum of both.

    Args:
        session: the session.
        own: this site's secrets.
        index: this site's index.
        cards: the checked list.
        senders: indices of all sites whose shares arrived, this one included.
        values: (D,) uint64 below 2^b: quantised, with this site's share of the noise.
        bits: b.

    Returns:
        (D,) uint64 below 2^b; indistinguishable from random numbers to anybody who lacks the seed or a key.
    """
    wanted = set(senders) - {index}
    total = values + primitives.expand(own.seed, values.size, bits)
    for card in cards:
        if card.index in wanted:
            seed = pair_seed(session, own.mask_key, from_hex(card.mask_key), index, card.index)
            stream = primitives.expand(seed, values.size, bits)
            total = total + stream if card.index > index else total - stream
    return reduce_bits(total, bits)


def sign_masked(
    session: Session, cards: Sequence[Card], senders: Iterable[int], asked: str, signer: ec.EllipticCurvePrivateKey
) -> bytes:
    """Signature that this site masked for just these cards and senders, and was asked just this.

    Args:
        session: the session.
        cards: the list.
        senders: indices of all sites whose shares arrived, this one included.
        asked: digest of what the server sent with the task, such as the parameters.
        signer: the registered key.
    """
    return primitives.sign(signer, "masked", _masked_part(session, cards, senders, asked))


def is_masked_signed(
    session: Session, card: Card, cards: Sequence[Card], senders: Iterable[int], asked: str, signature: bytes
) -> bool:
    """Whether this is the card's site's signature of `sign_masked`."""
    part = _masked_part(session, cards, senders, asked)
    return primitives.is_signed(primitives.load_public(card.key), signature, "masked", part)


def check_survivors(
    session: Session,
    index: int,
    cards: Sequence[Card],
    senders: Iterable[int],
    asked: str,
    survivors: Mapping[int, bytes],
) -> None:
    """Refuse to unmask a sum of too few sites, or of sites that did not mask for the same list as this one.

    Args:
        session: the session.
        index: this site's index.
        cards: the checked list: each names the key that this site pinned.
        senders: the sites that this one masked for, this one included.
        asked: digest of what the server sent with the task.
        survivors: index -> signature of `sign_masked`, of every site in the sum.

    Raises:
        ProtocolError: says which; nothing is revealed.
    """
    known, masked_for = {card.index: card for card in cards}, set(senders)
    least = session.assumptions.threshold
    if len(survivors) < least:
        raise ProtocolError(f"the sum holds {len(survivors)} sites, at least {least} must be in it")
    if index not in survivors or not set(survivors) <= masked_for:
        raise ProtocolError("the sum lacks this site, or holds one that it did not mask for")
    for other, signature in survivors.items():
        if not is_masked_signed(session, known[other], cards, masked_for, asked, signature):
            raise ProtocolError(
                f"{known[other].name} did not sign the same lists and task as this site: the server sent different ones"
            )


def reveal(shares: Mapping[int, bytes], survivors: Iterable[int]) -> dict[int, bytes]:
    """One share of each sender's: of its seed if its vector is in the sum, else of its mask key.

    Args:
        shares: sender's index -> its two shares, this site's own included.
        survivors: indices of the sites in the sum.

    Returns:
        Sender's index -> the one share. To be answered once.
    """
    present = set(survivors)
    return {sender: both[:SHARE_BYTES] if sender in present else both[SHARE_BYTES:] for sender, both in shares.items()}


def pair_seed(session: Session, private: bytes, public: bytes, one: int, other: int) -> bytes:
    """Seed of the mask between two sites, the same at both."""
    low, high = sorted((one, other))
    return primitives.agree(private, public, f"mask/{low}/{high}", session.binding)


def _box_key(session: Session, private: bytes, public: bytes, listed: str, sender: int, receiver: int) -> bytes:
    return primitives.agree(private, public, f"box/{sender}/{receiver}/{listed}", session.binding)


def _masked_part(session: Session, cards: Sequence[Card], senders: Iterable[int], asked: str) -> list[object]:
    return [session.binding, list_digest(cards), sorted(senders), asked]
