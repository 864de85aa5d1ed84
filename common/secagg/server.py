"""The server's side of one secure sum: take the masks off the sum of those that sent, with the shares that sites gave.

The server holds no secret of its own, and needs no pinned keys: whatever it gets wrong, or lies about, the sites find.
What it checks, it checks to know which site to do without.

Source: Bonawitz et al. (2017), figure 4, round 4. Departs: shares and rebuilt secrets are held against what their
owners committed to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from common.errors import BlameError, ProtocolError
from common.secagg import primitives
from common.secagg.messages import DIGEST_BYTES, Card, Session, from_hex
from common.secagg.quantise import Words, add_up, reduce_bits
from common.secagg.shamir import rebuild_secret
from common.secagg.site import commit_share, pair_seed

_OTHER_SECRET = "sealed shares of another secret than its card is about"


def check_revealed(
    session: Session,
    helper: int,
    shares: Mapping[int, bytes],
    masked: Iterable[int],
    commitments: Mapping[int, Mapping[int, bytes]],
) -> None:
    """Refuse an answer to unmasking that does not hold just the shares which their owners committed to.

    Args:
        session: the session.
        helper: index of the site that answered.
        shares: owner's index -> share, its answer.
        masked: indices of the sites in the sum.
        commitments: owner's index -> holder's index -> what its owner committed to; of the sites whose shares were
            passed on.

    Raises:
        ProtocolError: the site lies: it held the right shares against their commitments when it got them.
    """
    in_sum = set(masked)
    if set(shares) != set(commitments):
        raise ProtocolError("it gave shares of other sites than it holds")
    for owner, share in shares.items():
        is_seed = owner in in_sum
        both = commitments[owner][helper]
        wanted = both[:DIGEST_BYTES] if is_seed else both[DIGEST_BYTES:]
        if commit_share(session, owner, helper, share, is_seed=is_seed) != wanted:
            raise ProtocolError("it gave other shares than it was given")


def unmask(
    session: Session,
    cards: Sequence[Card],
    senders: Iterable[int],
    masked: Mapping[int, Words],
    revealed: Mapping[int, Mapping[int, bytes]],
    bits: int,
) -> Words:
    """The sum of the vectors that arrived.

    Args:
        session: the session.
        cards: the list that the sites were sent.
        senders: indices of the sites whose shares were passed on: each masked for all of these.
        masked: index -> masked vector, of the sites in the sum.
        revealed: answering site's index -> owner's index -> the share it gave, after `check_revealed`.
        bits: b.

    Returns:
        (D,) uint64, the sum modulo 2^b of the vectors before masking.

    Raises:
        BlameError: what a site committed to as shares of its secret gives another secret than its card's.
        ProtocolError: too few sites sent or answered.
    """
    least = session.assumptions.threshold
    if len(masked) < least or len(revealed) < least:
        raise ProtocolError(
            f"{len(masked)} sites sent their sums and {len(revealed)} helped to unmask, at least {least} are needed"
        )
    known = {card.index: card for card in cards}
    total = add_up(list(masked.values()), bits)
    for owner in sorted(set(senders)):
        card = known[owner]
        shares = {helper + 1: table[owner] for helper, table in revealed.items() if owner in table}
        if owner in masked:
            seed = _rebuild(shares, least, card)
            if primitives.commitment(seed).hex() != card.seed_commitment:
                raise BlameError({owner: _OTHER_SECRET})
            total = total - primitives.expand(seed, total.size, bits)
            continue
        key = _rebuild(shares, least, card)
        if primitives.public_key(key).hex() != card.mask_key:
            raise BlameError({owner: _OTHER_SECRET})
        for other in masked:
            stream = primitives.expand(
                pair_seed(session, key, from_hex(known[other].mask_key), owner, other), total.size, bits
            )
            # the survivor added its mask with the missing site if that one's index is the larger
            total = total - stream if owner > other else total + stream
    return reduce_bits(total, bits)


def _rebuild(shares: Mapping[int, bytes], threshold: int, card: Card) -> bytes:
    """The secret that the first `threshold` shares give; the shares are those that were committed to."""
    if len(shares) < threshold:
        raise ProtocolError(f"{len(shares)} shares of a secret of {card.name}, {threshold} are needed")
    secret = rebuild_secret({place: shares[place] for place in sorted(shares)[:threshold]})
    if secret is None:
        raise BlameError({card.index: _OTHER_SECRET})
    return secret
