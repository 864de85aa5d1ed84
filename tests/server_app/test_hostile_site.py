"""One registered site of three lies: it loses its own round, is named, and costs the others nothing.

Real server app, real sites, real ledgers, one process. Each kind of lie is one that ended or spoiled everybody's run.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error

from common.privacy.events import gaussian, sampled_gaussian
from server_app.register import REGISTER
from tests.harness import Federation, Handler, HarnessSite, words_of

LIAR, HONEST = "site-3", ["site-1", "site-2"]
ROUND = "train"
ONE_ROUND: dict[str, Any] = {"num_rounds": 1, "epsilon": 0.5, "round_timeout": 2.0, "tracking": "off"}
Change = Callable[[Message, Message], Message | None]


def lie(kind: str, change: Change) -> Any:
    """A network on which the liar's replies of one kind are changed."""

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        if site.name == LIAR and message.metadata.message_type == kind:
            return change(message, reply)
        return reply

    return tamper


def with_words(**words: Any) -> Change:
    """The reply with other words."""

    def change(message: Message, reply: Message) -> Message:
        content = dict(reply.content)
        content["words"] = ConfigRecord({**words_of(reply), **words})
        return Message(RecordDict(content), reply_to=message)

    return change


def with_fewer_charges(message: Message, reply: Message) -> Message:
    """The reply of a site that tells of its newest release alone."""
    charged = json.loads(words_of(reply)["charged"])[1:]
    return with_words(charged=json.dumps(charged))(message, reply)


def with_more_charges(message: Message, reply: Message) -> Message:
    """The reply of a site that adds to its charges a release that no step of this run is."""
    charged = [*json.loads(words_of(reply)["charged"]), [FOREIGN, 1]]
    return with_words(charged=json.dumps(charged))(message, reply)


def with_identity(**fields: Any) -> Change:
    """A hello whose identity has other fields."""

    def change(message: Message, reply: Message) -> Message:
        identity = {**json.loads(words_of(reply)["identity"]), **fields}
        return with_words(identity=json.dumps(identity))(message, reply)

    return change


def with_records(**records: Any) -> Change:
    """The reply with further records."""
    return lambda message, reply: Message(RecordDict({**reply.content, **records}), reply_to=message)


def with_array(spoil: Callable[[Array], Array]) -> Change:
    """The reply with its one packed tensor spoiled."""

    def change(message: Message, reply: Message) -> Message:
        arrays = reply.content.array_records["tensors"]
        spoiled = ArrayRecord({name: spoil(array) for name, array in arrays.items()})
        return Message(RecordDict({**reply.content, "tensors": spoiled}), reply_to=message)

    return change


def error(code: str, reference: str = "0123abcd") -> Change:
    """A refusal in place of the reply."""
    words = ConfigRecord({"error": code, "reference": reference})
    return lambda message, reply: Message(RecordDict({"words": words}), reply_to=message)


def numpy_bytes(header: str, values: bytes) -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + values


def event(**fields: Any) -> str:
    """An event in its canonical text."""
    kind = gaussian if fields.pop("kind", "sampled") == "gaussian" else sampled_gaussian
    return kind(**fields).to_json()


DEEP = "[" * 100_000
ABSURD = event(noise_multiplier=1e-3, sampling_rate=0.5, count=10_000_000)
FOREIGN = event(kind="gaussian", noise_multiplier=50.0)
ESCAPES = "\x1b[2J\x1b]0;all is well\x07"
# 4 GB of zeros by a header of a hundred bytes
HUGE_HEADER = numpy_bytes("{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296,), }", b"")
PICKLED = numpy_bytes("{'descr': '|O', 'fortran_order': False, 'shape': (546,), }", b"\x80\x04.")

WORDS: dict[str, Change] = {
    "charged is nested": with_words(charged=DEEP),
    "charged is no text": with_words(charged=3),
    "charged is a list": with_words(charged=["x"] * 3),
    "charged names no event": with_words(charged='[["x",1]]'),
    "charged names an absurd event": with_words(charged=json.dumps([[ABSURD, 1]])),
    "charged unrolls to gigabytes": with_words(charged=json.dumps([["x" * 10_000, 1_000_000]])),
    "charged counts by a bool": with_words(charged=json.dumps([[ABSURD, True]])),
    "charged has a number of 5,000 digits": with_words(charged=f"[[{json.dumps(ABSURD)},{'9' * 5000}]]"),
    "charged is empty": with_words(charged="[]"),
    "charged adds an event of another run": with_more_charges,
    "charged leaves out what was sent before": with_fewer_charges,
    "receipt clears the screen": with_words(receipt=ESCAPES),
    "receipt is none": with_words(receipt=""),
    "receipt is no digest": with_words(receipt="1:" + "g" * 64),
    "seal is none": with_words(seal=""),
    "receipt is a megabyte": with_words(receipt="0" * 1_000_000),
    "a word too many": with_words(loss=0.3),
    "a word whose name clears the screen": with_words(**{ESCAPES: 1}),
}
TENSORS: dict[str, Change] = {
    "a header that claims gigabytes": with_array(lambda a: Array(a.dtype, a.shape, a.stype, HUGE_HEADER)),
    "a header of objects": with_array(lambda a: Array(a.dtype, a.shape, a.stype, PICKLED)),
    "a shape that claims gigabytes": with_array(lambda a: Array(a.dtype, (2**31 - 1,), a.stype, a.data)),
    "another shape": with_array(lambda a: Array(a.dtype, (1, *a.shape), a.stype, a.data)),
    "another type": with_array(lambda a: Array(ESCAPES, a.shape, a.stype, a.data)),
    "another format": with_array(lambda a: Array(a.dtype, a.shape, "pickle", a.data)),
    "half of the bytes": with_array(lambda a: Array(a.dtype, a.shape, a.stype, a.data[: len(a.data) // 2])),
    "no bytes": with_array(lambda a: Array(a.dtype, a.shape, a.stype, b"")),
    "twice the bytes": with_array(lambda a: Array(a.dtype, a.shape, a.stype, a.data * 2)),
    "a record of arrays too many": with_records(more=ArrayRecord({"x": Array(np.zeros(3))})),
    "a record of words too many": with_records(more=ConfigRecord({"x": 1})),
    "scores": with_records(scores=MetricRecord({"mixed.accuracy": 1.0})),
}
ERRORS: dict[str, Change] = {
    "an error of no known code": error("all is well"),
    "an error that clears the screen": error(f"data{ESCAPES}"),
    "a rule that clears the screen": error(f"policy:{ESCAPES}"),
    "a reference that clears the screen": error("data", ESCAPES),
    "a reference of other length": error("data", "0" * 4000),
    "an error with more to say": lambda m, r: Message(
        RecordDict({"words": ConfigRecord({"error": "data", "reference": "0123abcd", "more": "x"})}), reply_to=m
    ),
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Three sites with room in their ledgers for many short runs."""
    return Federation.create(tmp_path_factory.mktemp("sites"), 3, lifetime_epsilon=100.0, lifetime_delta=1e-2)


def run(federation: Federation, tamper: Any, *, min_sites: int = 2, **settings: Any) -> dict[str, Any]:
    """A run of one round under a name of its own."""
    number = len(federation.traffic)
    return federation.run(
        tamper=tamper,
        run_id=number + 1,
        num_rounds=1,
        min_sites=min_sites,
        tracking="off",
        round_timeout=2.0,
        **settings,
    )


def honest_charges(federation: Federation, summary: Mapping[str, Any]) -> list[Counter[str]]:
    """What the honest sites' own ledgers hold against a run: number of releases by label."""
    found = []
    for name in HONEST:
        charged: Counter[str] = Counter()
        for one in federation.site(name).runs()[summary["run"]].charged:
            charged[one.label] += one.count
        found.append(charged)
    return found


def refused(summary: Mapping[str, Any], when: str) -> list[str]:
    """Whom the summary names, with the command that shuts it out."""
    for one in summary["refused_replies"]:
        assert one["shut_out_with"] == f"fedhypevae server revoke SERVER-FOLDER {one['site']}"
        assert one["why"].isprintable()
    return [one["site"] for one in summary["refused_replies"] if one["when"] == when]


@pytest.mark.parametrize("kind", [*WORDS, *TENSORS, *ERRORS])
def test_lie_in_a_round_costs_the_liar_the_round_and_nobody_else(
    federation: Federation, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    summary = run(federation, lie(ROUND, {**WORDS, **TENSORS, **ERRORS}[kind]))
    assert summary["rounds_taken_part"] == [HONEST]
    assert refused(summary, "round 1") == [LIAR]
    spent = summary["privacy"]["epsilon_spent_per_site"]
    assert spent["site-1"] == spent["site-2"] > spent[LIAR] > 0  # what it said last that could be right
    assert honest_charges(federation, summary) == [Counter(statistics=1, training=1)] * 2
    said = capsys.readouterr().out
    assert f"a reply of {LIAR} is not used" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("kind", [*WORDS, *TENSORS])
def test_lie_in_the_statistics_costs_the_liar_the_statistics(federation: Federation, kind: str) -> None:
    summary = run(federation, lie("query.statistics", {**WORDS, **TENSORS}[kind]))
    assert refused(summary, "statistics") == [LIAR]
    assert summary["rounds_taken_part"] == [[*HONEST, LIAR]]
    assert honest_charges(federation, summary) == [Counter(statistics=1, training=1)] * 2


HELLOS: dict[str, Change] = {
    "identity is nested": with_words(identity=DEEP),
    "identity is a list": with_words(identity="[]"),
    "identity has a width of 10^12": with_identity(dimension=10**12),
    "identity has a width of true": with_identity(dimension=True),
    "identity has a million classes": with_identity(class_names=["x"] * 1_000_000),
    "identity clears the screen": with_identity(encoder=ESCAPES),
    "identity has a field too many": with_identity(more=1),
    "canary is none": with_words(canary="AAAA" * 3),
    "canary is no number": with_words(canary=base64.b64encode(np.full(12, np.nan, "<f4").tobytes()).decode()),
    "canary is a megabyte": with_words(canary="AAAA" * 300_000),
    "position is huge": with_words(position=2**62),
    "position is a bool": with_words(position=True),
    "public is a number": with_words(public=1),
    "name of another site": with_words(site="site-1"),
    "name clears the screen": with_words(site=ESCAPES),
    "name is markup": with_words(site="[red]site-3[/red]"),
    "name is long": with_words(site="x" * 100_000),
    "nothing": lambda message, reply: Message(RecordDict({}), reply_to=message),
    "an error of no known code": error(ESCAPES),
}


@pytest.mark.parametrize("kind", HELLOS)
def test_lie_in_the_hello_leaves_the_liar_out_and_the_others_go_on(
    federation: Federation, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    summary = run(federation, lie("query.hello", HELLOS[kind]))
    assert summary["rounds_taken_part"] == [HONEST]
    assert set(refused(summary, "hello")) == {str(federation.site(LIAR).node)}
    assert honest_charges(federation, summary) == [Counter(statistics=1, training=1)] * 2
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("field", ["dimension", "class_names", "weights_digest"])
def test_site_that_differs_from_all_others_is_left_out(federation: Federation, field: str) -> None:
    value: Any = {"dimension": 13, "class_names": ["liver", "lung", "heart"] * 3000, "weights_digest": "f" * 64}[field]
    summary = run(federation, lie("query.hello", with_identity(**{field: value})))
    assert summary["rounds_taken_part"] == [HONEST]
    assert refused(summary, "hello")[0] == LIAR
    assert len(summary["refused_replies"][0]["why"]) < 1000


@pytest.mark.parametrize("change", [error("data"), lambda m, r: Message(Error(2, ESCAPES), reply_to=m)])
def test_site_that_refuses_at_the_meeting_ends_the_run_only_where_all_must_be_there(
    federation: Federation, capsys: pytest.CaptureFixture[str], change: Change
) -> None:
    node = federation.site(LIAR).node
    summary = run(federation, lie("query.hello", change))
    assert summary["rounds_taken_part"] == [HONEST]
    said = capsys.readouterr().out
    assert f"hello: site {node} is missing" in said
    assert "\x1b" not in said
    with pytest.raises(SystemExit):
        run(federation, lie("query.hello", change), min_sites=3)
    assert "expected 3 sites, 2 said hello" in federation.status()["error"]


def test_with_a_register_the_site_whose_key_has_another_name_is_left_out(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The liar has the lower node here: without the register the name would be its own."""
    register = tmp_path / "sites.json"
    nodes = {site.node: site.name for site in federation.sites}
    register.write_text(
        json.dumps([{"node_id": str(node), "name": name, "status": "registered"} for node, name in nodes.items()])
    )
    monkeypatch.setenv(REGISTER, str(register))

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        liar = site.name == "site-1" and message.metadata.message_type == "query.hello"
        return with_words(site=LIAR)(message, reply) if liar else reply

    summary = run(federation, tamper)
    assert summary["rounds_taken_part"] == [["site-2", LIAR]]
    assert refused(summary, "hello")[0] == "site-1"


def test_site_that_is_in_no_register_is_left_out(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = federation.sites[:2]
    register = tmp_path / "sites.json"
    register.write_text(
        json.dumps([{"node_id": str(site.node), "name": site.name, "status": "registered"} for site in known])
    )
    monkeypatch.setenv(REGISTER, str(register))
    assert run(federation, None)["rounds_taken_part"] == [HONEST]


def test_name_of_a_member_that_is_claimed_in_mid_run_stays_the_members(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 3)
    late = federation.site(LIAR)
    federation.absent.add(late.node)

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if message.metadata.group_id == "round-1":
            federation.absent.clear()
        reply = handler()
        lies = site.name == LIAR and message.metadata.message_type == "query.hello"
        return with_words(site="site-1")(message, reply) if lies else reply

    summary = federation.run(tamper=tamper, num_rounds=3, num_sites=2, min_sites=2)
    assert summary["rounds_taken_part"] == [HONEST] * 3
    assert refused(summary, "hello") == [str(late.node)]
    assert late.entries() == 1


def test_reply_that_another_node_sent_is_nobodys(federation: Federation) -> None:
    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        if site.name == LIAR and message.metadata.message_type == ROUND:
            reply.metadata.__dict__["_src_node_id"] = federation.site("site-1").node
        return reply

    summary = run(federation, tamper)
    assert summary["rounds_taken_part"] == [HONEST]
    assert summary["rounds_missing"] == [{LIAR: "did not answer in time"}]


def test_reply_that_flower_cannot_decode_takes_no_other_along(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower decodes what it pulls: a bad reply raises there, before the server app sees a message."""
    from tests.harness import InProcessGrid

    pull = InProcessGrid.pull_messages
    bad: set[str] = set()

    def pull_messages(self: InProcessGrid, message_ids: Any) -> list[Message]:
        wanted = list(message_ids)
        found = pull(self, wanted)
        for message in found:
            if message.metadata.src_node_id == federation.site(LIAR).node and message.metadata.message_type == ROUND:
                bad.update(wanted)
                raise ValueError("Unexpected set of `children`")
        return found

    monkeypatch.setattr(InProcessGrid, "pull_messages", pull_messages)
    summary = run(federation, None)
    assert len(bad) == 1
    assert summary["rounds_taken_part"] == [HONEST]
    assert refused(summary, "round 1") == [LIAR]


def test_fault_of_the_server_in_one_reply_is_logged_whole_and_costs_that_reply(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import server_app.exchange as exchange

    read, calls = exchange.read_reply, []

    def broken(message: Message, expected: Any) -> Any:
        if expected.kind == "train" and message.metadata.src_node_id == federation.site(LIAR).node:
            calls.append(1)
            raise RecursionError(f"deep inside {ESCAPES}")
        return read(message, expected)

    monkeypatch.setattr(exchange, "read_reply", broken)
    summary = run(federation, None)
    assert summary["rounds_taken_part"] == [HONEST]
    assert refused(summary, "round 1") == [LIAR]
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert all(words in said for words in ("Traceback", "deep inside", str(federation.site(LIAR).node)))


def test_flowers_own_errors_and_honest_refusals_are_absences_and_no_lies(federation: Federation) -> None:
    for change in (lambda m, r: Message(Error(2, ESCAPES), reply_to=m), error("budget"), error("policy:run_epsilon")):
        summary = run(federation, lie(ROUND, change))
        assert summary["rounds_taken_part"] == [HONEST]
        assert summary["refused_replies"] == []
        assert list(summary["rounds_missing"][0]) == [LIAR]
        assert "\x1b" not in summary["rounds_missing"][0][LIAR]


@pytest.mark.parametrize(
    "scores",
    [{"mixed.accuracy": 0.5}, {"mixed.accuracy": 2.0, "mixed.balanced_accuracy": 0.5}, {"mixed.accuracy": [0.5]}],
)
def test_score_that_is_none_costs_its_sender_the_evaluation(tmp_path: Path, scores: Any) -> None:
    federation = Federation.create(tmp_path, 3, data_is_public=True, metrics_may_leave=True)
    summary = run(federation, lie("evaluate", with_records(scores=MetricRecord(scores))))
    assert refused(summary, "evaluate") == [LIAR]
    assert set(summary["scores"]["synthetic_only"]["per_site"]) == set(HONEST)
