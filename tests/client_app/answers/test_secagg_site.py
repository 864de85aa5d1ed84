"""A site under secure aggregation against a server that lies, repeats or mixes up, and a server against such sites."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.common.serde import message_from_proto, message_to_proto

from client_app.answers.peers import own_signer, pinned_peers
from client_app.place import find_place
from common.config.run import RunConfig
from common.errors import ConfigError
from deploy.machine.keys import make_node_key
from tests.harness import Federation, Handler, HarnessSite, changed, deliver, words_of
from tests.secagg_cases import PHASES, ROUNDS_ONLY, SHARED, keyed_federation, phase_of

QUICK: dict[str, Any] = {**SHARED, **ROUNDS_ONLY, "num_rounds": 1, "round_timeout": 0.5}
EVERYONE = ["site-1", "site-2", "site-3", "site-4"]
Lie = Callable[[Message], Message]


def round_of(message: Message) -> str:
    return str(message.content.config_records["words"].get("what", ""))


def lying_server(lies: dict[tuple[str, str], Lie]) -> Any:
    """The server's messages of the first round, changed on their way to certain sites."""

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        lie = lies.get((site.name, phase_of(message)))
        return handler() if lie is None or round_of(message) != "round-1" else deliver(site, lie(message))

    return tamper


def spoiled_sites(spoils: dict[tuple[str, str], Lie]) -> Any:
    """Replies of the first round, changed on their way to the server."""

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        spoil = spoils.get((site.name, phase_of(message)))
        reply = handler()
        return reply if spoil is None or round_of(message) != "round-1" else spoil(reply)

    return tamper


def commits(site: HarnessSite) -> int:
    return sum(known.payload_digest is not None for run in site.runs().values() for known in run.rounds.values())


def aborted(federation: Federation, tamper: Any, **settings: Any) -> str:
    with pytest.raises(SystemExit):
        federation.run(**{**QUICK, **settings}, tamper=tamper)
    return str(federation.status()["error"])


def test_every_message_of_a_finished_run_is_refused_when_it_comes_again(tmp_path: Path) -> None:
    federation = keyed_federation(tmp_path)
    federation.run(**QUICK)
    asked = [seen for seen in federation.traffic if not seen.to_server and seen.kind.startswith("query.secagg")]
    before = [site.entries() for site in federation.sites]
    for seen in asked:
        words = words_of(deliver(federation.site(seen.site), seen.message))
        if seen.kind == "query.secagg_keys":  # fresh keys, of which no other site knows: worth nothing
            assert set(words) == {"card"}
        else:
            assert words["error"] == "protocol"
    assert [site.entries() for site in federation.sites] == before


def test_round_is_summed_under_its_own_name_alone(tmp_path: Path) -> None:
    """Under another's it would be charged, and its state taken, as that round's."""
    federation = keyed_federation(tmp_path)
    federation.run(**{**QUICK, "num_rounds": 2})
    site, asked = federation.sites[0], federation.asked("query.secagg_keys", "site-1")
    assert words_of(deliver(site, changed(asked, attempt="a" * 32))).keys() == {"card"}  # the control
    for what, number in (("round-1", 1), ("round-2", 0), ("round-02", 1), ("training", 1)):
        words = words_of(deliver(site, changed(asked, attempt="b" * 32, what=what, round=number)))
        assert words["error"] == "policy:request"


def test_name_of_a_run_used_again_with_other_settings_is_refused(tmp_path: Path) -> None:
    federation = keyed_federation(tmp_path)
    federation.run(**QUICK, run_name="trial")
    before = [site.entries() for site in federation.sites]
    assert "policy:run_name" in aborted(federation, None, run_name="trial", seed=7)
    assert [site.entries() for site in federation.sites] == before


@pytest.mark.parametrize("phase", PHASES)
def test_message_that_comes_twice_is_answered_once(tmp_path: Path, phase: str) -> None:
    federation, second = keyed_federation(tmp_path), []

    def twice(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        if phase_of(message) == phase:
            second.append(words_of(handler()))
        return reply

    summary = federation.run(**QUICK, tamper=twice)
    assert summary["rounds_taken_part"] == [EVERYONE]
    assert second
    assert all(words["error"] == "protocol" for words in second)


def test_secrets_between_messages_are_the_owner_s_alone_and_erased(tmp_path: Path) -> None:
    federation, seen = keyed_federation(tmp_path), []

    def look(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        files = list(site.folder.rglob("secagg*"))
        if phase_of(message) in PHASES[:-1]:
            seen.append(stat.S_IMODE(files[0].stat().st_mode))
        elif phase_of(message) == PHASES[-1]:
            assert not files
        return reply

    federation.run(**QUICK, tamper=look)
    assert set(seen) == {0o600}


def test_asking_for_both_kinds_of_shares_is_refused(tmp_path: Path) -> None:
    """First with all four in the sum, then with one of them missing: that would give both secrets of it."""
    federation, answers = keyed_federation(tmp_path), []

    def ask_both(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if phase_of(message) != "secagg_unmask" or round_of(message) != "round-1":
            return handler()
        survivors = json.loads(str(message.content.config_records["words"]["survivors"]))
        less = json.dumps([pair for pair in survivors if pair[0] != (3 if site.name != "site-4" else 2)])
        reply = handler()
        answers.append(words_of(deliver(site, changed(message, survivors=less))))
        return reply

    federation.run(**QUICK, tamper=ask_both)
    assert len(answers) == 4
    assert all(words["error"] == "protocol" for words in answers)


def drop_survivors(count: int) -> Lie:
    def lie(message: Message) -> Message:
        survivors = json.loads(str(message.content.config_records["words"]["survivors"]))
        return changed(message, survivors=json.dumps(survivors[:count]))

    return lie


def swap_card(message: Message) -> Message:
    cards = json.loads(str(message.content.config_records["words"]["cards"]))
    key = cards[-1]["mask_key"]
    cards[-1]["mask_key"] = f"{int(key[:2], 16) ^ 1:02x}{key[2:]}"  # another key, whatever this one is
    return changed(message, cards=json.dumps(cards))


def shorten_cards(message: Message) -> Message:
    cards = json.loads(str(message.content.config_records["words"]["cards"]))
    return changed(message, cards=json.dumps(cards[:3]))


def swap_boxes(message: Message) -> Message:
    boxes = json.loads(str(message.content.config_records["words"]["boxes"]))
    boxes[0][1], boxes[1][1] = boxes[1][1], boxes[0][1]
    return changed(message, boxes=json.dumps(boxes))


def other_parameters(message: Message) -> Message:
    copy = message_from_proto(message_to_proto(message))
    tensors = copy.content.array_records["tensors"].to_torch_state_dict()
    name = next(name for name in sorted(tensors) if tensors[name].dim() == 2)
    tensors[name] = tensors[name] + 1.0
    copy.content["tensors"] = ArrayRecord(tensors)
    return copy


def survivors_mixed_up(message: Message) -> Message:
    survivors = json.loads(str(message.content.config_records["words"]["survivors"]))
    survivors[0][1], survivors[1][1] = survivors[1][1], survivors[0][1]
    return changed(message, survivors=json.dumps(survivors))


# What the server tells site-1 and site-2 instead of the truth; two refusals are one too many for d = 1.
LIES: dict[str, tuple[str, Lie]] = {
    "a forged key": ("secagg_shares", swap_card),
    "exchanged shares": ("secagg_check", swap_boxes),
    "too few survivors": ("secagg_unmask", drop_survivors(2)),
    "signatures of others": ("secagg_unmask", survivors_mixed_up),
    "another attempt": ("secagg_unmask", lambda message: changed(message, attempt="0" * 32)),
    "no attempt": ("secagg_shares", lambda message: changed(message, attempt="../" * 8)),
    "another round's name": ("secagg_masked", lambda message: changed(message, what="round-9")),
    "fewer sites": ("secagg_shares", lambda message: changed(message, {"config": {"colluders": 0}})),
    "garbage": ("secagg_unmask", lambda message: changed(message, survivors="[" * 5000)),
}


@pytest.mark.parametrize("name", LIES)
def test_lie_of_the_server_is_refused_and_nothing_is_unmasked(tmp_path: Path, name: str) -> None:
    phase, lie = LIES[name]
    federation = keyed_federation(tmp_path)
    told = aborted(federation, lying_server({("site-1", phase): lie, ("site-2", phase): lie}))
    assert any(code in told for code in ("protocol", "policy:request", "policy:run_name", "is left out"))
    assert all(commits(site) == 0 for site in federation.sites[:2])
    charged = sum(len(run.charged) for run in federation.sites[0].runs().values())
    before_reading = phase != "secagg_unmask"
    assert charged == (0 if before_reading else 1)


def test_site_that_is_shown_another_list_drops_out(tmp_path: Path) -> None:
    """One site is shown three of the four cards: it seals nothing for the fourth, and the others go on without it."""
    federation = keyed_federation(tmp_path)
    summary = federation.run(**QUICK, tamper=lying_server({("site-1", "secagg_shares"): shorten_cards}))
    assert summary["rounds_taken_part"] == [EVERYONE[1:]]
    assert commits(federation.sites[0]) == 0


def check_no_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lies does not check either: now all rests on the sites."""
    monkeypatch.setattr("server_app.secagg.is_masked_signed", lambda *_: True)


def test_other_parameters_for_one_site_are_found_by_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients at a point that the server chose for one site alone would single it out in the sum."""
    federation = keyed_federation(tmp_path)
    check_no_signatures(monkeypatch)
    told = aborted(federation, lying_server({("site-2", "secagg_masked"): other_parameters}))
    assert told.count("protocol") >= 3
    assert all(commits(site) == 0 for site in federation.sites)


def huge_parameters(message: Message) -> Message:
    copy = message_from_proto(message_to_proto(message))
    tensors = copy.content.array_records["tensors"].to_torch_state_dict()
    copy.content["tensors"] = ArrayRecord({name: value + 1e6 for name, value in tensors.items()})
    return copy


def test_parameters_beyond_the_public_bounds_are_refused_under_secagg(tmp_path: Path) -> None:
    """By every site, before it is charged for the round."""
    federation = keyed_federation(tmp_path)
    lies = {(name, "secagg_masked"): huge_parameters for name in EVERYONE}
    assert aborted(federation, lying_server(lies)).count("refused: config") == 4
    assert all(not run.charged for site in federation.sites for run in site.runs().values())


@pytest.mark.parametrize("kind", ["train", "query.statistics"])
def test_unmasked_release_is_refused_under_secagg(tmp_path: Path, kind: str) -> None:
    federation = keyed_federation(tmp_path)
    federation.run(trust="local", num_rounds=1)
    site = federation.sites[0]
    before = site.entries()
    message = changed(federation.asked(kind, "site-1"), {"config": {"trust": "secagg"}}, run="other")
    words = words_of(deliver(site, message))
    assert str(words["error"]).startswith("policy")
    assert site.entries() == before


# What sites send wrongly.


def with_words(**words: Any) -> Lie:
    def spoil(reply: Message) -> Message:
        reply.content.config_records["words"].update(words)
        return reply

    return spoil


def with_masked(array: Any) -> Lie:
    def spoil(reply: Message) -> Message:
        reply.content["tensors"] = ArrayRecord({"masked": array})
        return reply

    return spoil


def another_index(reply: Message) -> Message:
    card = json.loads(str(reply.content.config_records["words"]["card"]))
    return with_words(card=json.dumps({**card, "index": 0}))(reply)


SPOILS: dict[str, tuple[str, Lie]] = {
    "a card that is none": ("secagg_keys", with_words(card="7")),
    "another site's card": ("secagg_keys", another_index),
    "garbage for shares": ("secagg_shares", with_words(boxes="[[0, 1]]")),
    "too few shares": ("secagg_shares", with_words(boxes="[]")),
    "a vector that is too short": ("secagg_masked", with_masked(torch.zeros(3, dtype=torch.uint8))),
    "a vector of floats": ("secagg_masked", with_masked(torch.zeros(3))),
    "no signature": ("secagg_masked", with_words(signature="zz")),
}


@pytest.mark.parametrize("name", SPOILS)
def test_one_site_that_sends_garbage_is_left_out(tmp_path: Path, name: str) -> None:
    phase, spoil = SPOILS[name]
    federation = keyed_federation(tmp_path)
    summary = federation.run(**QUICK, tamper=spoiled_sites({("site-2", phase): spoil}))
    assert summary["rounds_taken_part"] == [["site-1", "site-3", "site-4"]]
    assert "site-2" in summary["rounds_missing"][0]


@pytest.mark.parametrize("share", ["00" * 33, "ff" * 40])
def test_wrong_share_is_left_out_of_the_rebuilding(tmp_path: Path, share: str) -> None:
    wrong = json.dumps([[index, share] for index in range(4)])
    federation = keyed_federation(tmp_path)
    summary = federation.run(**QUICK, tamper=spoiled_sites({("site-1", "secagg_unmask"): with_words(shares=wrong)}))
    assert summary["rounds_taken_part"] == [EVERYONE]


def test_two_wrong_shares_abort(tmp_path: Path) -> None:
    wrong = with_words(shares=json.dumps([[index, "00" * 33] for index in range(4)]))
    spoils = {("site-1", "secagg_unmask"): wrong, ("site-2", "secagg_unmask"): wrong}
    assert "wrong shares" in aborted(keyed_federation(tmp_path), spoiled_sites(spoils))


def test_forged_signature_that_the_server_takes_is_refused_by_the_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_no_signatures(monkeypatch)
    spoils = {("site-2", "secagg_masked"): with_words(signature="00" * 100)}
    assert "protocol" in aborted(keyed_federation(tmp_path), spoiled_sites(spoils))


def test_vector_out_of_range_is_seen_in_the_sum(tmp_path: Path) -> None:
    """Any bytes are numbers of the range: a site that adds random ones shows in the norm of the sum."""
    size = 0

    def learn(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        nonlocal size
        reply = handler()
        if phase_of(message) == "secagg_masked" and round_of(message) == "round-1" and site.name == "site-3":
            size = reply.content.array_records["tensors"]["masked"].numpy().size
            noise = np.random.default_rng(1).integers(256, size=size, dtype=np.uint8)
            return with_masked(torch.from_numpy(noise))(reply)
        return reply

    assert "more than the" in aborted(keyed_federation(tmp_path), learn)


# Keys and peers.


def place_of(site: HarnessSite) -> Any:
    config = RunConfig()
    return find_place({"data-dir": str(site.folder), "site-name": site.name}, config)


def without(peers: dict[str, str]) -> str:
    return json.dumps({name: line for name, line in peers.items() if name != "site-1"})


def doubled(peers: dict[str, str]) -> str:
    return json.dumps({**peers, "site-2": peers["site-3"]})


def exchanged(peers: dict[str, str]) -> str:
    return json.dumps({**peers, "site-1": peers["site-2"], "site-2": peers["site-1"]})


BAD_PEERS: dict[str, Callable[[dict[str, str]], str]] = {
    "no JSON": lambda _: "peers",
    "a list": lambda _: "[]",
    "no key": lambda peers: json.dumps({**peers, "site-2": "key"}),
    "a number": lambda peers: json.dumps({**peers, "site-2": 3}),
    "one key twice": doubled,
    "without itself": without,
    "another's key for its own": exchanged,
}


@pytest.mark.parametrize("name", BAD_PEERS)
def test_bad_list_of_peers_is_refused(tmp_path: Path, name: str) -> None:
    site = keyed_federation(tmp_path).sites[0]
    path = site.folder / "peers.json"
    assert len(pinned_peers(place_of(site))) == 4
    path.write_text(BAD_PEERS[name](json.loads(path.read_text())))
    with pytest.raises(ConfigError):
        pinned_peers(place_of(site))


def test_missing_peers_or_key_is_refused_with_what_to_do(tmp_path: Path) -> None:
    site = keyed_federation(tmp_path).sites[0]
    (site.folder / "peers.json").unlink()
    with pytest.raises(ConfigError, match="compared by people"):
        pinned_peers(place_of(site))
    (site.folder / "keys" / "node").unlink()
    with pytest.raises(ConfigError, match="node key"):
        own_signer(place_of(site))


def test_site_with_an_unknown_key_is_shut_out_by_the_others(tmp_path: Path) -> None:
    """Somebody answers in site-2's name with a key of his own, which the others did not pin: they go on without."""
    federation = keyed_federation(tmp_path)
    folder = federation.sites[1].folder
    (folder / "keys" / "node").unlink()
    make_node_key(folder / "keys" / "node")
    peers = json.loads((folder / "peers.json").read_text())
    peers["site-2"] = (folder / "keys" / "node.pub").read_text()
    (folder / "peers.json").write_text(json.dumps(peers))
    summary = federation.run(**QUICK)
    assert summary["rounds_taken_part"] == [["site-1", "site-3", "site-4"]]
    assert "in a dispute" in summary["left_out"]["site-2"]
    assert federation.sites[1].entries() == 1
    assert "another key in this site's list of peers" in federation.sites[0].log()
