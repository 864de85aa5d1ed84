"""The protocol: exact sums whoever drops out, vectors that look random, and what sites refuse to a lying server."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from scipy import stats

from common.errors import ProtocolError
from common.secagg import primitives, server, site
from common.secagg.assumptions import Assumptions
from common.secagg.messages import (
    Card,
    Session,
    cards_from_json,
    cards_to_json,
    indices_from_json,
    table_from_json,
    table_to_json,
)
from common.secagg.quantise import Words, add_up
from common.secagg.rounds import PHASES, secure_sum
from common.secagg.shamir import SHARE_BYTES, rebuild_secret

BITS = 40


@lru_cache(maxsize=64)
def signer(index: int) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def signers(count: int) -> list[ec.EllipticCurvePrivateKey]:
    return [signer(index) for index in range(count)]


def session(count: int = 5, dropouts: int = 1, colluders: int = 1, attempt: str = "a" * 32) -> Session:
    return Session("run", "round-1", attempt, "c" * 64, Assumptions(count, dropouts, colluders))


def vectors(count: int, size: int, seed: int = 0) -> list[Words]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2**BITS, size=size, dtype=np.uint64) for _ in range(count)]


@pytest.mark.parametrize("case", range(200))
def test_sum_is_exact_whoever_drops_out(case: int) -> None:
    """Random numbers of sites, dropouts spread over the phases at random, up to d in all."""
    rng = np.random.default_rng(case)
    dropouts, colluders = int(rng.integers(0, 3)), int(rng.integers(0, 2))
    count = int(rng.integers(max(2 * dropouts + colluders + 1, colluders + 2), 8))
    dropouts = dropouts if case % 4 else 0
    values = vectors(count, 17, case)
    leaving = rng.permutation(count)[: int(rng.integers(0, dropouts + 1))]
    missing: dict[str, set[int]] = {}
    for index in leaving:
        missing.setdefault(PHASES[int(rng.integers(4))], set()).add(int(index))
    total, seen = secure_sum(session(count, dropouts, colluders), signers(count), values, BITS, missing)
    before_sum = {index for phase in PHASES[:3] for index in missing.get(phase, set())}
    np.testing.assert_array_equal(total, add_up([values[i] for i in range(count) if i not in before_sum], BITS))
    assert set(seen.masked) == set(range(count)) - before_sum


@pytest.mark.parametrize("phase", PHASES)
def test_one_dropout_too_many_aborts(phase: str) -> None:
    missing: dict[str, set[int]] = {phase: {0}}
    secure_sum(session(), signers(5), vectors(5, 3), BITS, missing)  # d = 1 is borne
    for other in PHASES:
        both = {**missing, other: missing.get(other, set()) | {3}}
        with pytest.raises(ProtocolError, match="at least 4"):
            secure_sum(session(), signers(5), vectors(5, 3), BITS, both)


def test_each_masked_vector_looks_random() -> None:
    """Flat, and blind to its input: constant inputs, which any leak would show."""
    size, count = 20_000, 10
    values = [np.full(size, 1000 * index, dtype=np.uint64) + vectors(1, size, index)[0] // 2**20 for index in range(10)]
    total, seen = secure_sum(session(count), signers(count), values, BITS, {"masked": {4}})
    np.testing.assert_array_equal(total, add_up([v for i, v in enumerate(values) if i != 4], BITS))
    for index, masked in seen.masked.items():
        assert stats.kstest(masked / 2.0**BITS, "uniform").pvalue > 1e-6
        assert abs(np.corrcoef(masked.astype(float), values[index].astype(float))[0, 1]) < 6 / np.sqrt(size)
        low = (masked & np.uint64(255)).astype(int)
        assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-6
    pairs = [np.corrcoef(seen.masked[i], seen.masked[j])[0, 1] for i in seen.masked for j in seen.masked if i < j]
    assert max(map(abs, pairs)) < 6 / np.sqrt(size)


def test_unmasked_vector_would_be_caught() -> None:
    """The check above finds a vector that went out under too small a mask."""
    leaked = vectors(1, 20_000)[0] // 2**3
    assert stats.kstest(leaked / 2.0**BITS, "uniform").pvalue < 1e-6


def test_nothing_repeats_in_a_second_attempt() -> None:
    values = vectors(5, 50)
    first = secure_sum(session(), signers(5), values, BITS)[1]
    second = secure_sum(session(attempt="b" * 32), signers(5), values, BITS)[1]
    for index in range(5):
        assert first.cards[index] != second.cards[index]
        assert not np.array_equal(first.masked[index], second.masked[index])


class Round:
    """Five sites up to a phase, by hand, so that a lie can be told in between."""

    def __init__(self, count: int = 5, **changes: Any) -> None:
        self.session = replace(session(count), **changes)
        self.pins = {f"site-{i}": signer(i).public_key() for i in range(count)}
        made = [site.make_keys(self.session, i, f"site-{i}", signer(i)) for i in range(count)]
        self.own, self.cards = [one for one, _ in made], tuple(card for _, card in made)

    def check(self, cards: tuple[Card, ...], index: int = 0) -> None:
        site.check_cards(self.session, cards, self.cards[index], self.pins)

    def boxes_with(self, receiver: int, last: bytes) -> dict[int, bytes]:
        """All boxes for a receiver, the last site's being this one."""
        return {**self.boxes_for(receiver), 4: last}

    def boxes_for(self, receiver: int) -> dict[int, bytes]:
        return {
            i: site.make_shares(self.session, self.own[i], i, self.cards)[1][receiver]
            for i in range(len(self.cards))
            if i != receiver
        }


def swapped(cards: tuple[Card, ...], place: int, card: Card) -> tuple[Card, ...]:
    return (*cards[:place], card, *cards[place + 1 :])


def test_foreign_and_replayed_cards_are_refused() -> None:
    now, before, elsewhere = Round(), Round(attempt="b" * 32), Round(run="another")
    now.check(now.cards)
    stranger = site.make_keys(now.session, 1, "site-1", ec.generate_private_key(ec.SECP384R1()))[1]
    unknown = site.make_keys(now.session, 1, "mallory", signer(1))[1]
    another_index = site.make_keys(now.session, 1, "site-2", signer(2))[1]
    forged = replace(now.cards[1], mask_key=primitives.public_key(primitives.new_key()).hex())
    assumed = Round(assumptions=Assumptions(5, 1, 0))
    for card in (stranger, unknown, another_index, forged, before.cards[1], elsewhere.cards[1], assumed.cards[1]):
        text = cards_to_json(swapped(now.cards, 1, card))
        with pytest.raises(ProtocolError):  # site-2 twice is found when the list is read
            now.check(cards_from_json(text, 5))


def test_list_without_own_card_or_too_short_is_refused() -> None:
    now = Round()
    now.check(now.cards[:4])
    with pytest.raises(ProtocolError, match="at least 4"):
        now.check(now.cards[:3])
    with pytest.raises(ProtocolError, match="own card"):
        now.check(now.cards[1:])
    with pytest.raises(ProtocolError, match="own card"):
        now.check(swapped(now.cards, 0, site.make_keys(now.session, 0, "site-0", signer(0))[1]))


def test_different_key_lists_are_found_by_the_shares() -> None:
    """The server hides site-4 from site-0: what the others sealed under the whole list does not open."""
    now = Round()
    short = now.cards[:4]
    now.check(short)
    boxes = {sender: box for sender, box in now.boxes_for(0).items() if sender < 4}
    with pytest.raises(ProtocolError, match="another list"):
        site.open_shares(now.session, now.own[0], 0, short, boxes)
    site.open_shares(now.session, now.own[0], 0, now.cards, now.boxes_for(0))


def test_changed_exchanged_or_missing_shares_are_refused() -> None:
    now = Round()
    good = now.boxes_for(0)
    bad = [
        {**good, 1: good[1][:-1] + bytes([good[1][-1] ^ 1])},
        {**good, 1: good[2], 2: good[1]},
        {**good, 1: now.boxes_for(2)[1]},
        {**good, 1: b"garbage"},
        {**good, 0: good[1]},
        {1: good[1], 2: good[2]},
    ]
    for boxes in bad:
        with pytest.raises(ProtocolError):
            site.open_shares(now.session, now.own[0], 0, now.cards, boxes)


@pytest.fixture
def masked() -> tuple[Round, dict[int, bytes]]:
    now = Round()
    return now, {i: site.sign_masked(now.session, now.cards, range(5), "task", signer(i)) for i in range(5)}


def survive(now: Round, survivors: dict[int, bytes], senders: Any = range(5), asked: str = "task") -> None:
    site.check_survivors(now.session, 0, now.cards, senders, asked, survivors, now.pins)


def test_survivors_who_masked_for_others_are_refused(masked: tuple[Round, dict[int, bytes]]) -> None:
    """Different lists of senders, another task, a forged or another's signature: the server told sites apart."""
    now, signatures = masked
    survive(now, signatures)
    survive(now, {i: signatures[i] for i in (0, 1, 2, 4)})
    others = [
        site.sign_masked(now.session, now.cards, [0, 1, 2, 3], "task", signer(1)),
        site.sign_masked(now.session, now.cards[:4], range(5), "task", signer(1)),
        site.sign_masked(now.session, now.cards, range(5), "other parameters", signer(1)),
        site.sign_masked(replace(now.session, attempt="b" * 32), now.cards, range(5), "task", signer(1)),
        signatures[2],
        b"garbage",
    ]
    for other in others:
        with pytest.raises(ProtocolError, match="told them apart"):
            survive(now, {**signatures, 1: other})


def test_too_few_or_wrong_survivors_are_refused(masked: tuple[Round, dict[int, bytes]]) -> None:
    now, signatures = masked
    with pytest.raises(ProtocolError, match="at least 4"):
        survive(now, {i: signatures[i] for i in (0, 1, 2)})
    with pytest.raises(ProtocolError, match="lacks this site"):
        survive(now, {i: signatures[i] for i in (1, 2, 3, 4)})
    with pytest.raises(ProtocolError, match="did not mask for"):
        survive(now, signatures, senders=[0, 1, 2, 3])


def test_one_kind_of_share_is_revealed_for_each_site() -> None:
    shares = {i: bytes([i]) * SHARE_BYTES + bytes([100 + i]) * SHARE_BYTES for i in range(4)}
    given = site.reveal(shares, [0, 1, 3])
    assert given == {i: bytes([i if i != 2 else 102]) * SHARE_BYTES for i in range(4)}


def test_asking_half_of_the_sites_for_each_kind_gives_neither_more() -> None:
    """A server that tells some sites that site-4 sent and others that it did not: too few shares of both kinds."""
    now = Round()
    mine, boxes = site.make_shares(now.session, now.own[4], 4, now.cards)
    both = {4: mine} | {
        i: site.open_shares(now.session, now.own[i], i, now.cards, now.boxes_with(i, boxes[i]))[4] for i in range(4)
    }
    told = {0: range(5), 1: range(5), 4: range(5), 2: range(4), 3: range(4)}
    given = {i: site.reveal({4: both[i]}, told[i])[4] for i in told}
    pools = [{i + 1: given[i] for i in told if (4 in told[i]) is sent} for sent in (True, False)]
    # site 3 colludes: it gives both kinds
    pools[0][4], pools[1][4] = both[3][:SHARE_BYTES], both[3][SHARE_BYTES:]
    assert not all(len(pool) >= now.session.assumptions.threshold for pool in pools)
    seed = rebuild_secret(pools[0])
    assert seed == now.own[4].seed  # four told the truth's way: that is allowed
    assert rebuild_secret(pools[1]) != now.own[4].mask_key


def answered(count: int = 6, dropouts: int = 1) -> tuple[Session, list[Words], Any]:
    now, values = session(count, dropouts, 0), vectors(count, 5)
    return now, values, secure_sum(now, signers(count), values, BITS)[1]


def test_wrong_share_is_left_out_or_found() -> None:
    now, values, seen = answered()
    spoiled = {**seen.revealed, 0: {**seen.revealed[0], 3: seen.revealed[1][3]}}
    total = server.unmask(now, seen.cards, range(6), seen.masked, spoiled, BITS)
    np.testing.assert_array_equal(total, add_up(values, BITS))
    del spoiled[5]  # now all five that are left are needed
    with pytest.raises(ProtocolError, match="wrong shares"):
        server.unmask(now, seen.cards, range(6), seen.masked, spoiled, BITS)
    short = {**seen.revealed, 0: {**seen.revealed[0], 3: b"short"}}
    np.testing.assert_array_equal(server.unmask(now, seen.cards, range(6), seen.masked, short, BITS), total)


def test_owner_that_shared_another_key_is_found() -> None:
    """A site's shares that give something else than its card: the sum is not taken for right."""
    now, _, seen = answered()
    cards = swapped(seen.cards, 2, replace(seen.cards[2], seed_commitment="0" * 64))
    with pytest.raises(ProtocolError, match="site-2"):
        server.unmask(now, cards, range(6), seen.masked, seen.revealed, BITS)


def test_key_that_makes_every_secret_the_same_is_refused() -> None:
    with pytest.raises(ProtocolError, match="can't be used"):
        primitives.agree(primitives.new_key(), bytes(32), "mask", "session")


GOOD = asdict(Card(0, "a", "00" * 32, "11" * 32, "22" * 32, "33"))
GARBAGE_CARDS = [
    "",
    "{}",
    "[1]",
    "[[]]",
    "[" * 100_000,
    json.dumps([{**GOOD, "index": 9}]),
    json.dumps([{**GOOD, "index": True}]),
    json.dumps([{**GOOD, "index": -1}]),
    json.dumps([{**GOOD, "box_key": "zz"}]),
    json.dumps([{**GOOD, "box_key": "00"}]),
    json.dumps([{**GOOD, "name": 7}]),
    json.dumps([{**GOOD, "extra": 1}]),
    json.dumps([GOOD, GOOD]),
    json.dumps([GOOD, {**GOOD, "index": 1, "name": "b"}]),
    json.dumps([GOOD] * 20),
]


@pytest.mark.parametrize("text", GARBAGE_CARDS, ids=range(len(GARBAGE_CARDS)))
def test_garbage_cards_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        cards_from_json(text, 5)
    assert cards_from_json(json.dumps([GOOD]), 5)


@pytest.mark.parametrize("text", ["", "7", "[[1]]", "[[1, 2]]", '[[9, "00"]]', '[[1, "00"], [1, "00"]]', '[[1, "0"]]'])
def test_garbage_tables_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        table_from_json(text, 5)


@pytest.mark.parametrize("text", ["[9]", "[1, 1]", '["1"]', "[true]", "null"])
def test_garbage_indices_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        indices_from_json(text, 5)


def test_tables_travel() -> None:
    table = {3: b"abc", 0: b""}
    assert table_from_json(table_to_json(table), 5) == table
    cards = Round().cards
    assert cards_from_json(cards_to_json(reversed(cards)), 5) == cards
