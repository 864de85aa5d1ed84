"""One exchange: what is let through, what is refused and why; a reply is counted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import cast

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from server_app.bounds import check_norm
from server_app.exchange import Exchange, Outcome, build_messages, receive


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who speaks, as Flower's own process would have set it."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)


SHAPES = {"a": (2,), "b": (3,)}
WORDS: dict[str, str | int | float | bool | bytes] = {"receipt": "", "seal": "", "charged": "[]"}
GOOD = {"a": torch.ones(2), "b": torch.zeros(3)}


class Link:
    """Stands for the way to the sites: hands out prepared answers, by node, all at once and some of them twice."""

    def __init__(self, answers: dict[int, list[dict[str, Tensor] | Error]]) -> None:
        self._answers = answers
        self._ready: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identities = []
        for message in messages:
            identity = f"{message.metadata.group_id}-{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = identity
            identities.append(identity)
            for answer in self._answers.get(message.metadata.dst_node_id, []):
                if isinstance(answer, Error):
                    self._ready.append(Message(answer, reply_to=message))
                else:
                    content = RecordDict({"words": ConfigRecord(WORDS), "tensors": ArrayRecord(dict(answer))})
                    self._ready.append(Message(content, reply_to=message))
        return identities

    def pull_messages(self, identities: Iterable[str]) -> list[Message]:
        wanted = set(identities)
        ready = [message for message in self._ready if message.metadata.reply_to_message_id in wanted]
        self._ready = [message for message in self._ready if message not in ready]
        return ready


def ask(answers: dict[int, list[dict[str, Tensor] | Error]], largest: float = 100.0) -> Outcome:
    messages = build_messages("train", [1, 2], lambda _: {}, lambda _: {}, "round-1", 60.0)
    check = partial(check_norm, largest=largest)
    return Exchange("train", messages, lambda _: SHAPES, check).read(receive(cast(Grid, Link(answers)), messages, 0.5))


GARBAGE: dict[str, tuple[dict[str, Tensor] | Error, str]] = {
    "not finite": ({**GOOD, "a": torch.tensor([1.0, float("nan")])}, "not finite"),
    "infinite": ({**GOOD, "a": torch.tensor([1.0, float("inf")])}, "not finite"),
    "shape": ({**GOOD, "a": torch.ones(3)}, "shape"),
    "dtype": ({**GOOD, "a": torch.ones(2, dtype=torch.float64)}, "float64"),
    "half the bits": ({**GOOD, "a": torch.ones(2, dtype=torch.float16)}, "float16"),
    "bytes": ({**GOOD, "a": torch.ones(2, dtype=torch.uint8)}, "uint8"),
    "one more": ({**GOOD, "packed": torch.zeros(4, dtype=torch.uint8)}, "allow-list"),
    "nothing": ({}, "missing"),
    "unknown name": ({**GOOD, "c": torch.ones(1)}, "allow-list"),
    "missing name": ({"a": GOOD["a"]}, "missing"),
    "huge": ({**GOOD, "a": torch.full((2,), 1e30)}, "norm"),
    "huge beyond float32": ({**GOOD, "a": torch.full((2,), 3e38)}, "norm"),
    "failed": (Error(code=2, reason="patient 17 has no label"), "its app failed"),
    "refused app": (Error(code=2, reason="<class '__main__.AppRefused'>:<'...'>"), "refused the app"),
    "dead": (Error(code=5, reason=""), "unreachable"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_exchange_uses_nothing_of_a_garbage_reply_and_says_why(kind: str) -> None:
    answer, words = GARBAGE[kind]
    outcome = ask({1: [GOOD], 2: [answer]})
    assert set(outcome.replies) == {1}
    assert all(torch.equal(outcome.replies[1].tensors[name], GOOD[name]) for name in GOOD)
    assert words in outcome.missing[2]
    assert "patient 17" not in outcome.missing[2]


def test_tensors_that_were_let_go_of_are_not_taken_for_the_next_ones() -> None:
    """Each node has tensors of its own, made when its message is: none gets another's."""
    messages = build_messages(
        "train", range(50), lambda _: {}, lambda node: {"x": torch.full((3,), float(node))}, "g", 1.0
    )
    found = [message.content.array_records["tensors"].to_torch_state_dict()["x"][0].item() for message in messages]
    assert found == [float(node) for node in range(50)]


def test_exchange_counts_a_reply_once() -> None:
    outcome = ask({1: [GOOD, {**GOOD, "a": torch.full((2,), 7.0)}], 2: [GOOD]})
    assert torch.equal(outcome.replies[1].tensors["a"], GOOD["a"])
    assert set(outcome.replies) == {1, 2}
    assert not outcome.missing


def test_exchange_names_a_site_that_is_silent() -> None:
    outcome = ask({1: [GOOD]})
    assert set(outcome.replies) == {1}
    assert outcome.missing == {2: "did not answer in time"}


def test_exchange_counts_no_answer_that_comes_in_a_later_round() -> None:
    """A site that was too slow for one round answers it in the next: that answer is nobody's, its own one counts."""
    late, asked = {**GOOD, "a": torch.full((2,), 9.0)}, []
    link = Link({1: [GOOD]})
    for number in (1, 2):
        messages = build_messages("train", [1, 2], lambda _: {}, lambda _: {}, f"round-{number}", 60.0)
        if number == 2:
            link._answers = {1: [GOOD], 2: [GOOD]}
            content = RecordDict({"words": ConfigRecord(WORDS), "tensors": ArrayRecord(dict(late))})
            link._ready.append(Message(content, reply_to=asked[0][1]))
        asked.append(messages)
        outcome = Exchange("train", messages, lambda _: SHAPES).read(receive(cast(Grid, link), messages, 0.3))
        assert set(outcome.replies) == ({1} if number == 1 else {1, 2})
    assert torch.equal(outcome.replies[2].tensors["a"], GOOD["a"])


def test_exchange_lets_the_largest_honest_norm_pass() -> None:
    assert set(ask({1: [GOOD], 2: [GOOD]}, largest=2.0**0.5 + 1e-9).replies) == {1, 2}
    assert not ask({1: [GOOD], 2: [GOOD]}, largest=2.0**0.5 - 1e-6).replies


def test_tensors_that_are_taken_in_at_once_are_not_kept() -> None:
    taken: dict[int, dict[str, Tensor]] = {}
    messages = build_messages("train", [1, 2, 3], lambda _: {}, lambda _: {}, "round-1", 60.0)
    link = cast(Grid, Link({1: [GOOD, GOOD], 2: [{**GOOD, "a": torch.ones(3)}], 3: [GOOD]}))

    def take(node: int, tensors: Mapping[str, Tensor]) -> None:
        assert node not in taken
        taken[node] = dict(tensors)

    outcome = Exchange("train", messages, lambda _: SHAPES, take=take).read(receive(link, messages, 0.5))
    assert set(taken) == set(outcome.replies) == {1, 3}  # nothing refused is taken in, and nothing twice
    assert all(torch.equal(taken[3][name], value) for name, value in GOOD.items())
    assert all(reply.tensors == {} and reply.num_bytes > 0 for reply in outcome.replies.values())
