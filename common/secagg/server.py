"""The server's side of one secure sum: take the masks off the sum of those that sent, with the shares that sites gave.

The server holds no secret of its own, and needs no pinned keys: whatever it gets wrong, or lies about, the sites find.

Source: Bonawitz et al. (2017), figure 4, round 4. Departs: rebuilt secrets are held against what their owners committed
to, and a wrong share is left out where enough others are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations, islice

from common.errors import ProtocolError
from common.secagg import primitives
from common.secagg.messages import Card, Session, from_hex
from common.secagg.quantise import Words, add_up, reduce_bits
from common.secagg.shamir import SHARE_BYTES, rebuild_secret
from common.secagg.site import pair_seed

_MOST_TRIES = 500


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
        revealed: answering site's index -> owner's index -> the share it gave.
        bits: b.

    Returns:
        (D,) uint64, the sum modulo 2^b of the vectors before masking.

    Raises:
        ProtocolError: too few sites sent or answered, or the shares of a secret do not fit what its owner committed to.
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
            seed = _rebuild(shares, least, card, partial(_commits, card))
            total = total - primitives.expand(seed, total.size, bits)
            continue
        key = _rebuild(shares, least, card, partial(_is_key, card))
        for other in masked:
            stream = primitives.expand(
                pair_seed(session, key, from_hex(known[other].mask_key), owner, other), total.size, bits
            )
            # the survivor added its mask with the missing site if that one's index is the larger
            total = total - stream if owner > other else total + stream
    return reduce_bits(total, bits)


def _rebuild(shares: Mapping[int, bytes], threshold: int, card: Card, fits: Callable[[bytes], bool]) -> bytes:
    """The secret that some `threshold` of the shares give and that fits; wrong shares are left out where it can be."""
    places = sorted(place for place, share in shares.items() if len(share) == SHARE_BYTES)
    if len(places) < threshold:
        raise ProtocolError(f"{len(places)} shares of a secret of {card.name}, {threshold} are needed")
    spare = range(len(places) - threshold + 1)
    left_out = (set(some) for number in spare for some in combinations(places, number))
    for some in islice(left_out, _MOST_TRIES):
        chosen = [place for place in places if place not in some][:threshold]
        secret = rebuild_secret({place: shares[place] for place in chosen})
        if secret is not None and fits(secret):
            return secret
    raise ProtocolError(
        f"the shares of a secret of {card.name} do not give it: that site, or one that answered, sent wrong shares"
    )


def _commits(card: Card, secret: bytes) -> bool:
    return primitives.commitment(secret).hex() == card.seed_commitment


def _is_key(card: Card, secret: bytes) -> bool:
    return primitives.public_key(secret).hex() == card.mask_key
