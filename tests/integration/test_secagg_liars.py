"""Whole runs under `trust = "secagg"` with a site that lies: who is named, who goes on, and what the others pay."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, Message

from common.errors import BlameError
from common.secagg import primitives, site
from common.secagg.messages import indices_to_json
from tests.harness import Handler, HarnessSite, changed, deliver, words_of
from tests.secagg_cases import ROUNDS_ONLY, SHARED, keyed_federation, phase_of

RUN: dict[str, Any] = {**SHARED, **ROUNDS_ONLY, "round_timeout": 0.5, "spare_rounds": 1}
HONEST = ["site-1", "site-2", "site-3"]
EVERYONE = [*HONEST, "site-4"]
Real = Callable[..., Any]
# What the liar's code does in place of a function of `common.secagg.site`.
Instead = Callable[[Real], Real]


def training(site: HarnessSite) -> int:
    """Releases of rounds that a site's ledger was charged for, in vain or not."""
    return sum(event.count for run in site.runs().values() for event in run.charged)


def liar(monkeypatch: pytest.MonkeyPatch, function: str, instead: Instead, name: str = "site-4") -> Any:
    """A site whose own app does something else in one function; the others run the real one."""

    def tamper(at: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if at.name != name:
            return handler()
        with monkeypatch.context() as patch:
            patch.setattr(f"common.secagg.site.{function}", instead(getattr(site, function)))
            return handler()

    return tamper


def card_with(signer: ec.EllipticCurvePrivateKey | None = None, **fields: Any) -> Instead:
    """A card with other fields, signed as it then is."""

    def instead(real: Real) -> Real:
        def make_keys(session: Any, index: int, name: str, own: ec.EllipticCurvePrivateKey) -> Any:
            secrets, card = real(session, index, name, own)
            bad = dataclasses.replace(card, **fields)
            signed = primitives.sign(signer or own, "card", bad.signed_part(session)).hex()
            return secrets, dataclasses.replace(bad, signature=fields.get("signature", signed))

        return make_keys

    return instead


def replayed() -> Instead:
    """The card of the first attempt, shown again in every later one."""
    shown: list[Any] = []

    def instead(real: Real) -> Real:
        def make_keys(*arguments: Any) -> Any:
            made = real(*arguments)
            shown.append(made)
            return shown[0]

        return make_keys

    return instead


def boxes_of(change: Callable[[dict[int, bytes]], dict[int, bytes]]) -> Instead:
    def instead(real: Real) -> Real:
        def make_shares(*arguments: Any) -> Any:
            own, boxes, commitments = real(*arguments)
            return own, change(boxes), commitments

        return make_shares

    return instead


def other_secret(real: Real) -> Real:
    """Boxes that open, and hold shares of another secret than the one that is committed to."""

    def make_shares(session: Any, own: Any, index: int, cards: Any) -> Any:
        kept, _, commitments = real(session, own, index, cards)
        wrong = dataclasses.replace(own, seed=bytes(32), mask_key=primitives.new_key())
        return kept, real(session, wrong, index, cards)[1], commitments

    return make_shares


def signed_by(change: Callable[[bytes], bytes]) -> Instead:
    return lambda real: lambda *arguments: change(real(*arguments))


def refusing(refused: Callable[[int], dict[int, str]]) -> Instead:
    """A site that says of others' cards that they can't be used."""

    def instead(real: Real) -> Real:
        def check_cards(session: Any, cards: Any, own: Any, pins: Any) -> None:
            real(session, cards, own, pins)
            raise BlameError(refused(len(cards)))

        return check_cards

    return instead


STRANGER = ec.generate_private_key(ec.SECP384R1())
ORDER_EIGHT = 39382357235489614581723060781553021112529911719440698176882885853963445705823
# What site-4 does, in which function.
LIES: dict[str, tuple[str, Instead]] = {
    "a mask key of order 4": ("make_keys", card_with(mask_key=bytes(32).hex())),
    "a mask key of order 1": ("make_keys", card_with(mask_key=(1).to_bytes(32, "little").hex())),
    "a box key of order 8": ("make_keys", card_with(box_key=ORDER_EIGHT.to_bytes(32, "little").hex())),
    "a key written twice": ("make_keys", card_with(mask_key=(9 + 2**255).to_bytes(32, "little").hex())),
    "a key that is none": ("make_keys", card_with(mask_key="zz")),
    "a card that nobody signed": ("make_keys", card_with(signature="00" * 100)),
    "a card that a stranger signed": ("make_keys", card_with(STRANGER)),
    "a card under a stranger's key": (
        "make_keys",
        card_with(STRANGER, key=primitives.public_line(STRANGER.public_key())),
    ),
    "another site's card": ("make_keys", card_with(index=0, name="site-1")),
    "a card of an earlier attempt": ("make_keys", replayed()),
    "boxes of garbage": ("make_shares", boxes_of(lambda boxes: {i: bytes(len(box)) for i, box in boxes.items()})),
    "garbage for two": ("make_shares", boxes_of(lambda boxes: {**boxes, 0: bytes(82), 1: bytes(82)})),
    "garbage for one": ("make_shares", boxes_of(lambda boxes: {**boxes, 1: bytes(82)})),
    "boxes that are too short": ("make_shares", boxes_of(lambda boxes: dict.fromkeys(boxes, b"short"))),
    "boxes that are exchanged": ("make_shares", boxes_of(lambda boxes: {**boxes, 0: boxes[1], 1: boxes[0]})),
    "no box for one": ("make_shares", boxes_of(lambda boxes: {i: boxes[i] for i in boxes if i != 1})),
    "shares of another secret": ("make_shares", other_secret),
    "a signature of zeros": ("sign_masked", signed_by(lambda signed: bytes(len(signed)))),
    "no signature": ("sign_masked", signed_by(lambda _: b"")),
    "a stranger's signature": ("sign_masked", signed_by(lambda _: primitives.sign(STRANGER, "masked", []))),
    "slander of all": ("check_cards", refusing(lambda cards: dict.fromkeys(range(cards - 1), "slander"))),
    "wrong shares of masks": ("reveal", lambda _: lambda shares, __: dict.fromkeys(shares, bytes(33))),
    "no shares of masks": ("reveal", lambda _: lambda *__: {}),
    "both kinds of shares": ("reveal", lambda _: lambda shares, __: shares),
}


@pytest.mark.parametrize("lie", LIES)
def test_site_that_lies_is_left_out_and_the_others_pay_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    """Each of the others pays for the two rounds that count, and for nothing else; the liar is named."""
    function, instead = LIES[lie]
    federation = keyed_federation(tmp_path)
    summary = federation.run(**RUN, tamper=liar(monkeypatch, function, instead))
    honest_once = function == "reveal" or lie == "a card of an earlier attempt"
    assert summary["rounds_taken_part"] == [EVERYONE if honest_once else HONEST, HONEST]
    assert [training(one) for one in federation.sites[:3]] == [2, 2, 2]
    assert [len(one.releases()) for one in federation.sites[:3]] == [2, 2, 2]
    # what the server sees by itself costs no attempt; what sites alone can see costs one, before the charge
    seen_by_sites = function in ("make_shares", "check_cards") or lie == "a card under a stranger's key"
    lost = 1 if seen_by_sites and lie != "no box for one" else 0
    assert len(federation.sent("site-1", "query.secagg_keys")) == 2 + lost
    masked_before = function in ("sign_masked", "reveal") or honest_once
    assert training(federation.sites[3]) == (1 if masked_before else 0)
    if lie == "garbage for one":  # its word against site-2's
        assert summary["left_out"] == {}
        assert "it and site-2 refuse what the other sent" in summary["rounds_missing"][0]["site-4"]
    else:
        assert set(summary["left_out"]) == {"site-4"}
        assert summary["left_out"]["site-4"] in summary["rounds_missing"][1]["site-4"]


def test_vector_of_the_wrong_length_costs_its_sender_alone(tmp_path: Path) -> None:
    def shorten(at: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        if at.name == "site-4" and phase_of(message) == "secagg_masked":
            reply.content["tensors"] = ArrayRecord({"masked": torch.zeros(5, dtype=torch.uint8)})
        return reply

    federation = keyed_federation(tmp_path)
    summary = federation.run(**RUN, tamper=shorten)
    assert summary["rounds_taken_part"] == [HONEST, HONEST]
    assert "site-4" in summary["rounds_missing"][0]
    assert [training(one) for one in federation.sites[:3]] == [2, 2, 2]


def test_site_that_slanders_one_after_the_other_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word against one other's: the accused goes first; against the second it is two words to one."""
    victims: list[int] = []

    def refused(_: int) -> dict[int, str]:
        victims.append(len(victims))
        return {victims[-1]: "slander"}

    federation = keyed_federation(tmp_path)
    summary = federation.run(**RUN, tamper=liar(monkeypatch, "check_cards", refusing(refused)))
    assert victims == [0, 1]
    assert set(summary["left_out"]) == {"site-4"}
    assert summary["rounds_taken_part"] == [HONEST, HONEST]
    assert [training(one) for one in federation.sites] == [2, 2, 2, 0]


@pytest.mark.parametrize("words", ["[9]", "[3]", "7", '["0"]', "[" * 1000, "[0, 0]"])
def test_refusal_that_makes_no_sense_costs_its_sender_alone(tmp_path: Path, words: str) -> None:
    def refuse(at: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        if at.name == "site-4" and phase_of(message) == "secagg_check":
            reply.content.config_records["words"]["refused"] = words
        return reply

    federation = keyed_federation(tmp_path)
    summary = federation.run(**RUN, tamper=refuse)
    assert summary["rounds_taken_part"] == [HONEST, HONEST]
    assert set(summary["left_out"]) == {"site-4"}
    assert [training(one) for one in federation.sites[:3]] == [2, 2, 2]


def another_seed(real: Real) -> Real:
    """Shares that are committed to, and give another secret than the card's: nobody can know before the unmasking."""

    def make_shares(session: Any, own: Any, index: int, cards: Any) -> Any:
        return real(session, dataclasses.replace(own, seed=bytes(32)), index, cards)

    return make_shares


def test_liar_that_costs_a_sum_is_out_for_the_rest_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shares give another secret than its card's: the lost sum proves it, and a spare round pays for it, once."""
    federation = keyed_federation(tmp_path)
    summary = federation.run(**RUN, tamper=liar(monkeypatch, "make_shares", another_seed))
    assert summary["rounds_taken_part"] == [HONEST, HONEST]
    assert set(summary["left_out"]) == {"site-4"}
    assert [training(one) for one in federation.sites] == [3, 3, 3, 1]


def test_server_that_is_stopped_between_attempts_remembers_the_liar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = keyed_federation(tmp_path)
    lies, settings = liar(monkeypatch, "make_shares", another_seed), {**RUN, "min_sites": 4}

    def stop_after_the_lost_sum(at: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if phase_of(message) == "secagg_keys" and federation.sent("site-1", "query.secagg_unmask"):
            raise KeyboardInterrupt
        return lies(at, message, handler)

    with pytest.raises(KeyboardInterrupt):
        federation.run(**settings, run_name="r", tamper=stop_after_the_lost_sum)
    sent = len(federation.sent("site-4"))
    summary = federation.run(**settings, run_name="r", resume=True, tamper=lies)
    assert summary["rounds_taken_part"] == [HONEST, HONEST]
    assert [training(one) for one in federation.sites] == [3, 3, 3, 1]
    assert {seen.kind for seen in federation.sent("site-4")[sent:]} == {"query.hello"}  # no work


def test_run_without_a_spare_round_stops_with_the_liar_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = keyed_federation(tmp_path)
    lies = liar(monkeypatch, "make_shares", another_seed)
    for attempt in range(3):
        with pytest.raises(SystemExit):
            federation.run(**{**RUN, "spare_rounds": 0}, run_name="r", resume=attempt > 0, tamper=lies)
        line = federation.status()["error"]
        assert "site-4 sealed shares of another secret" in line
        assert "spare-rounds pays for 0" in line
    assert [training(one) for one in federation.sites] == [1, 1, 1, 1]


def test_sums_that_are_lost_to_nobody_knows_whom_stop_the_run_when_no_spare_round_is_left(tmp_path: Path) -> None:
    """Random numbers for a vector: the sum shows it, nobody can tell whose it is; the sites pay what they declared."""

    def garbage(at: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        if at.name == "site-4" and phase_of(message) == "secagg_masked":
            size = reply.content.array_records["tensors"]["masked"].numpy().size
            noise = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
            reply.content["tensors"] = ArrayRecord({"masked": noise})
        return reply

    federation, lines = keyed_federation(tmp_path), []
    for attempt in range(4):
        with pytest.raises(SystemExit):
            federation.run(**RUN, run_name="r", resume=attempt > 0, tamper=garbage)
        lines.append(federation.status()["error"])
    assert "nobody knows which" in lines[0]
    assert all("charged for: 2, spare-rounds pays for 1" in line for line in lines[1:])
    assert [training(one) for one in federation.sites] == [2, 2, 2, 2]


def test_sum_is_not_masked_before_the_others_shares_are_checked(tmp_path: Path) -> None:
    """A server that leaves the check out gets no vector, and charges nobody."""
    federation, told = keyed_federation(tmp_path), []

    def skip(at: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if phase_of(message) != "secagg_check":
            return handler()
        early = changed(message)
        early.metadata.__dict__["_message_type"] = "query.secagg_masked"
        words = early.content.config_records["words"]
        for name in ("boxes", "commitments"):
            del words[name]
        told.append(words_of(deliver(at, early)))
        return None

    with pytest.raises(SystemExit):
        federation.run(**RUN, tamper=skip)
    assert [words["error"] for words in told] == ["protocol"] * 4
    assert all(training(one) == 0 for one in federation.sites)


def test_refusal_ends_the_attempt_at_the_site(tmp_path: Path) -> None:
    """No second try of other boxes against the same keys, and nothing of the attempt is left on the disk."""
    federation, answers = keyed_federation(tmp_path), []

    def spoil(at: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if phase_of(message) != "secagg_check" or at.name != "site-1" or answers:
            return handler()
        boxes = json.loads(str(message.content.config_records["words"]["boxes"]))
        boxes[0][1] = "00" * (len(boxes[0][1]) // 2)
        reply = deliver(at, changed(message, boxes=json.dumps(boxes)))
        answers.extend([words_of(reply), words_of(handler())])
        assert not list(at.folder.rglob("secagg.json"))
        return reply

    federation.run(**RUN, tamper=spoil)
    assert answers[0] == {"refused": indices_to_json([1])}
    assert answers[1]["error"] == "protocol"
    assert "a sealed share was changed" in federation.sites[0].log()
