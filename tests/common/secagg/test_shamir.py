"""Shares of a secret: any threshold of them give it, fewer fit every secret, a wrong one gives another."""

from __future__ import annotations

import secrets
from itertools import combinations

import pytest

from common.errors import ProtocolError
from common.secagg.shamir import PRIME, SHARE_BYTES, rebuild_secret, split_secret


def test_prime_is_prime() -> None:
    """Miller and Rabin with 40 random bases."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        power = pow(secrets.randbelow(PRIME - 3) + 2, odd, PRIME)
        chain = [power]
        for _ in range(twos - 1):
            chain.append(chain[-1] ** 2 % PRIME)
        assert power == 1 or PRIME - 1 in chain


@pytest.mark.parametrize(
    "secret", [bytes(32), b"\xff" * 32, secrets.token_bytes(32)], ids=["zero", "largest", "random"]
)
def test_any_threshold_of_shares_gives_the_secret(secret: bytes) -> None:
    shares = split_secret(secret, 3, [1, 2, 5, 9, 200])
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    for chosen in combinations(shares, 3):
        assert rebuild_secret({place: shares[place] for place in chosen}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """Two of three shares: for any secret there is a third share that gives it."""
    shares = split_secret(b"a" * 32, 3, [1, 2, 3])
    wanted = int.from_bytes(b"z" * 32, "big")
    # weights at zero of places 1, 2, 3 are 3, -3, 1
    third = (wanted - 3 * int.from_bytes(shares[1], "big") + 3 * int.from_bytes(shares[2], "big")) % PRIME
    assert rebuild_secret({1: shares[1], 2: shares[2], 3: third.to_bytes(33, "big")}) == b"z" * 32


def test_fewer_shares_than_the_threshold_do_not_give_the_secret() -> None:
    shares = split_secret(b"a" * 32, 4, [1, 2, 5, 9, 200])
    for count in (1, 2, 3):
        for chosen in combinations(shares, count):
            assert rebuild_secret({place: shares[place] for place in chosen}) != b"a" * 32


def test_shares_are_fresh_each_time() -> None:
    assert split_secret(b"a" * 32, 2, [1, 2]) != split_secret(b"a" * 32, 2, [1, 2])


def test_wrong_share_gives_another_secret() -> None:
    shares = split_secret(b"a" * 32, 2, [1, 2])
    assert rebuild_secret({1: shares[1], 2: shares[1]}) != b"a" * 32
    assert rebuild_secret({1: shares[1], 3: shares[2]}) != b"a" * 32


@pytest.mark.parametrize(
    ("secret", "threshold", "places"),
    [(b"short", 1, [1]), (bytes(32), 3, [1, 2]), (bytes(32), 0, [1]), (bytes(32), 1, [0]), (bytes(32), 2, [1, 1])],
)
def test_bad_arguments_are_refused(secret: bytes, threshold: int, places: list[int]) -> None:
    with pytest.raises(ProtocolError):
        split_secret(secret, threshold, places)
