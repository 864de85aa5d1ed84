"""The protocol: exact sums whoever drops out, vectors that look random, and what sites refuse to a lying server."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from scipy import stats

from common.errors import BlameError, ProtocolError
from common.secagg import primitives, server, site
from common.secagg.assumptions import Assumptions
from common.secagg.messages import (
    Card,
    Session,
    cards_from_json,
    cards_to_json,
    check_card,
    indices_from_json,
    indices_to_json,
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
        missing.setdefault(PHASES[int(rng.integers(len(PHASES)))], set()).add(int(index))
    total, seen = secure_sum(session(count, dropouts, colluders), signers(count), values, BITS, missing)
    before_sum = {index for phase in PHASES[:-1] for index in missing.get(phase, set())}
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

    @cached_property
    def shared(self) -> list[tuple[bytes, dict[int, bytes], dict[int, bytes]]]:
        """What each site makes of the list: its own shares, boxes, commitments."""
        return [site.make_shares(self.session, own, i, self.cards) for i, own in enumerate(self.own)]

    def boxes_for(self, receiver: int) -> dict[int, bytes]:
        return {i: boxes[receiver] for i, (_, boxes, _) in enumerate(self.shared) if i != receiver}

    def open(self, receiver: int, boxes: dict[int, bytes] | None = None, **bound: bytes) -> dict[int, bytes]:
        """Open what came for a receiver, some boxes or commitments (`of_1=`) being others."""
        boxes = self.boxes_for(receiver) if boxes is None else boxes
        wanted = {i: self.shared[i][2][receiver] for i in boxes}
        wanted |= {int(name.removeprefix("of_")): value for name, value in bound.items()}
        return site.open_shares(self.session, self.own[receiver], receiver, self.cards, boxes, wanted)


def swapped(cards: tuple[Card, ...], place: int, card: Card) -> tuple[Card, ...]:
    return (*cards[:place], card, *cards[place + 1 :])


@pytest.mark.parametrize(
    "other",
    [
        {"run": "another"},
        {"what": "round-2"},
        {"attempt": "f" * 32},
        {"context": "other settings"},
        {"assumptions": Assumptions(6, 1, 1)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_card_fits_no_session_that_differs_in_any_part(other: dict[str, Any]) -> None:
    first = session(5)
    _, card = site.make_keys(first, 0, "site-0", signer(0))
    check_card(first, card)
    assert replace(first, **other) != first
    with pytest.raises(ProtocolError, match="for this session"):
        check_card(replace(first, **other), card)


def test_secrets_of_a_session_are_random() -> None:
    made = [site.make_keys(session(5), 0, "site-0", signer(0))[0] for _ in range(20)]
    secrets = [value for own in made for value in (own.box_key, own.mask_key, own.seed)]
    assert len(set(secrets)) == len(secrets)
    bits = np.unpackbits(np.frombuffer(b"".join(own.seed for own in made), dtype=np.uint8))
    assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(bits.size)


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
    bound = {sender: now.shared[sender][2][0] for sender in boxes}
    with pytest.raises(BlameError, match="another list"):
        site.open_shares(now.session, now.own[0], 0, short, boxes, bound)
    now.open(0)


def test_changed_exchanged_or_missing_shares_are_refused() -> None:
    now = Round()
    good = now.boxes_for(0)
    bad = [
        ({1}, {**good, 1: good[1][:-1] + bytes([good[1][-1] ^ 1])}),
        ({1, 2}, {**good, 1: good[2], 2: good[1]}),
        ({1}, {**good, 1: now.boxes_for(2)[1]}),
        ({1}, {**good, 1: b"garbage"}),
        ({1}, {**good, 1: b""}),
    ]
    for blamed, boxes in bad:
        with pytest.raises(BlameError) as caught:
            now.open(0, boxes)
        assert set(caught.value.blamed) == blamed
    for boxes in ({**good, 0: good[1]}, {1: good[1], 2: good[2]}):
        with pytest.raises(ProtocolError, match=r"not on its own list|at least 4"):
            now.open(0, boxes)


def test_shares_that_were_not_committed_to_are_refused_and_name_their_sender() -> None:
    """A box that opens to shares of another secret is found before anything is charged, not in the unmasking."""
    now = Round()
    another = site.make_shares(now.session, now.own[1], 1, now.cards)
    with pytest.raises(BlameError, match="committed to") as caught:
        now.open(0, {**now.boxes_for(0), 1: another[1][0]})
    assert set(caught.value.blamed) == {1}
    half = now.shared[1][2][0][:32]
    for bound in (another[2][0], half + another[2][0][32:], half, b""):
        with pytest.raises(BlameError):
            now.open(0, of_1=bound)


@pytest.fixture
def masked() -> tuple[Round, dict[int, bytes]]:
    now = Round()
    return now, {i: site.sign_masked(now.session, now.cards, range(5), "task", signer(i)) for i in range(5)}


def survive(now: Round, survivors: dict[int, bytes], senders: Any = range(5), asked: str = "task") -> None:
    site.check_survivors(now.session, 0, now.cards, senders, asked, survivors)


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
        with pytest.raises(ProtocolError, match="the server sent different ones"):
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
    both = {4: now.shared[4][0]} | {i: now.open(i)[4] for i in range(4)}
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


def revealed_by(seen: Any, helper: int, shares: dict[int, bytes], now: Session, present: Any = None) -> None:
    server.check_revealed(now, helper, shares, seen.masked if present is None else present, seen.commitments)


def test_share_that_was_not_given_is_found_and_the_others_unmask() -> None:
    now, values, seen = answered()
    for helper, shares in seen.revealed.items():
        revealed_by(seen, helper, shares, now)
    good = seen.revealed[0]
    lies: list[dict[int, bytes]] = [
        {**good, 3: seen.revealed[1][3]},
        {**good, 3: bytes(SHARE_BYTES)},
        {**good, 3: b"short"},
        {**good, 0: good[1]},
        {owner: share for owner, share in good.items() if owner != 3},
        {},
    ]
    for lie in lies:
        with pytest.raises(ProtocolError, match="it gave"):
            revealed_by(seen, 0, lie, now)
    with pytest.raises(ProtocolError, match="than it was given"):  # of the other secret: site-3 counts as missing
        revealed_by(seen, 0, good, now, [0, 1, 2, 4, 5])
    left = {helper: shares for helper, shares in seen.revealed.items() if helper != 0}
    total = server.unmask(now, seen.cards, range(6), seen.masked, left, BITS)
    np.testing.assert_array_equal(total, add_up(values, BITS))
    del left[5]
    with pytest.raises(ProtocolError, match="at least 5"):
        server.unmask(now, seen.cards, range(6), seen.masked, left, BITS)


@pytest.mark.parametrize(("field", "missing"), [("seed_commitment", False), ("mask_key", True)])
def test_owner_that_shared_another_secret_is_named(field: str, missing: bool) -> None:
    """A site's shares that give something else than its card: the sum is not taken for right."""
    now, _, seen = answered()
    if missing:
        now, values = session(6, 1, 0), vectors(6, 5)
        seen = secure_sum(now, signers(6), values, BITS, {"masked": {2}})[1]
    cards = swapped(seen.cards, 2, replace(seen.cards[2], **{field: "0" * 64}))
    with pytest.raises(BlameError, match="another secret") as caught:
        server.unmask(now, cards, range(6), seen.masked, seen.revealed, BITS)
    assert set(caught.value.blamed) == {2}


P25519 = 2**255 - 19
# Every number below 2^256 that names a point of small order, on the curve or its twist (RFC 7748; Bernstein's list).
ORDER_EIGHT = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
SMALL = [
    value
    for point in (0, 1, *ORDER_EIGHT, P25519 - 1)
    for value in (point, point + P25519, point + 2**255, point + P25519 + 2**255)
    if value < 2**256
]
BASE_TWICE = 9 + P25519  # the base point, written a second way


@pytest.mark.parametrize("value", [*SMALL, BASE_TWICE, 9 + 2**255, P25519, 2**256 - 1])
@pytest.mark.parametrize("field", ["mask_key", "box_key"])
def test_key_of_small_order_or_written_twice_is_refused(value: int, field: str) -> None:
    now = Round()
    own, card = site.make_keys(now.session, 1, "site-1", signer(1))
    del own
    bad = replace(card, **{field: value.to_bytes(32, "little").hex()})
    bad = replace(bad, signature=primitives.sign(signer(1), "card", bad.signed_part(now.session)).hex())
    with pytest.raises(ProtocolError, match="can't be used"):
        check_card(now.session, bad)
    with pytest.raises(BlameError, match="can't be used") as caught:
        now.check(swapped(now.cards, 1, bad))
    assert set(caught.value.blamed) == {1}


@pytest.mark.parametrize(
    "changes",
    [
        {"attempt": "b" * 32},
        {"run": "another"},
        {"what": "round-2"},
        {"context": "d" * 64},
        {"assumptions": Assumptions(5, 1, 0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_masks_and_boxes_fit_no_other_session(changes: dict[str, Any]) -> None:
    """The same keys in another session agree on other masks, and open no box: two vectors never share a mask."""
    now, own, other = Round(), primitives.new_key(), primitives.public_key(primitives.new_key())
    elsewhere = replace(now.session, **changes)
    seed = site.pair_seed(now.session, own, other, 0, 1)
    assert seed == site.pair_seed(now.session, own, other, 1, 0)
    assert seed != site.pair_seed(elsewhere, own, other, 0, 1)
    assert seed != site.pair_seed(now.session, own, other, 0, 2)
    bound = {i: now.shared[i][2][0] for i in now.boxes_for(0)}
    with pytest.raises(BlameError, match="another list") as caught:
        site.open_shares(elsewhere, now.own[0], 0, now.cards, now.boxes_for(0), bound)
    assert set(caught.value.blamed) == {1, 2, 3, 4}


def test_commitment_binds_to_its_place() -> None:
    """Owner, holder, kind and session: a share passes in no other place than its own."""
    now, share = session(), bytes(range(SHARE_BYTES))

    def bound(owner: int = 1, holder: int = 2, at: Session = now, *, is_seed: bool = True) -> bytes:
        return site.commit_share(at, owner, holder, share, is_seed=is_seed)

    others = [bound(owner=2), bound(holder=1), bound(is_seed=False), bound(at=session(attempt="b" * 32)), bound(1, 3)]
    assert len({bound(), *others}) == 6
    assert bound() == bound()


def test_keys_that_sites_make_are_used() -> None:
    for _ in range(50):
        primitives.check_public(primitives.public_key(primitives.new_key()))
    primitives.check_public((9).to_bytes(32, "little"))


def test_card_names_the_key_that_signed_it_and_no_other() -> None:
    """A card under one key and vectors under another would be accepted here and refused there."""
    now = Round()
    stranger = ec.generate_private_key(ec.SECP384R1())
    good = now.cards[1]
    others = [
        replace(good, key=primitives.public_line(stranger.public_key())),
        replace(good, key=good.key + " comment"),
        replace(good, key="ssh-none AAAA"),
        replace(good, signature=good.signature.upper()),
        replace(good, mask_key=good.mask_key.upper()),
        replace(good, seed_commitment=good.seed_commitment[:-2]),
        replace(good, signature=""),
    ]
    for card in others:
        with pytest.raises(ProtocolError):
            check_card(now.session, card)
    by_itself = site.make_keys(now.session, 1, "site-1", stranger)[1]
    check_card(now.session, by_itself)  # whose key it is, those say who pinned it
    with pytest.raises(BlameError, match="another key"):
        now.check(swapped(now.cards, 1, by_itself))


def test_key_that_makes_every_secret_the_same_is_refused() -> None:
    with pytest.raises(ProtocolError, match="can't be used"):
        primitives.agree(primitives.new_key(), bytes(32), "mask", "session")


GOOD = asdict(Card(0, "a", "k", "00" * 32, "11" * 32, "22" * 32, "33"))
GARBAGE_CARDS = [
    "",
    "{}",
    "[1]",
    "[[]]",
    "[" * 100_000,
    json.dumps([{**GOOD, "index": 9}]),
    json.dumps([{**GOOD, "index": True}]),
    json.dumps([{**GOOD, "index": -1}]),
    json.dumps([{**GOOD, "box_key": "0" * 401}]),
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
    assert indices_from_json(indices_to_json({3, 1}), 5) == {1, 3}
    assert table_from_json(table_to_json(table), 5) == table
    cards = Round().cards
    assert cards_from_json(cards_to_json(reversed(cards)), 5) == cards
