"""Shamir's secret sharing (1979) of 32-byte secrets, over the prime field of 2^256 + 297 elements.

Any `threshold` shares rebuild the secret; fewer say nothing about it. A share is worth nothing without its place, and a
wrong share gives a wrong secret: anybody who rebuilds one checks it against what the owner committed to.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from functools import lru_cache

from common.errors import ProtocolError

PRIME = 2**256 + 297  # the smallest prime above 2^256
SECRET_BYTES, SHARE_BYTES = 32, 33


def split_secret(secret: bytes, threshold: int, places: Iterable[int]) -> dict[int, bytes]:
    """Shares of a secret.

    Args:
        secret: 32 bytes.
        threshold: how many shares rebuild it, at least 1.
        places: distinct positive numbers, one a share; at least `threshold` of them.

    Returns:
        place -> share of 33 bytes. The coefficients are the operating system's random numbers.

    Raises:
        ProtocolError: a secret of another length, or places that are too few, double or not positive.
    """
    wanted = sorted(places)
    if len(secret) != SECRET_BYTES:
        raise ProtocolError(f"a secret to share has {SECRET_BYTES} bytes, found {len(secret)}")
    if not 1 <= threshold <= len(wanted) or len(set(wanted)) != len(wanted) or wanted[0] < 1:
        raise ProtocolError(f"{len(wanted)} places can't share a secret with threshold {threshold}")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for place in wanted:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * place + coefficient) % PRIME
        shares[place] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def rebuild_secret(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret that these shares, all of them, determine.

    Args:
        shares: place -> share; exactly as many as the threshold.

    Returns:
        32 bytes, or None where the shares give no such number: at least one of them is wrong.
    """
    weights = _weights_at_zero(tuple(sorted(shares)))
    total = sum(weight * int.from_bytes(shares[place], "big") for place, weight in weights.items()) % PRIME
    return total.to_bytes(SECRET_BYTES, "big") if total < 2**256 else None


@lru_cache(maxsize=64)
def _weights_at_zero(places: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's weights at 0."""
    weights = {}
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weights[place] = above * pow(below, -1, PRIME) % PRIME
    return weights
