"""One exchange: what is let through, what is refused and why; a reply is counted once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from server_app.exchange import Outcome, build_messages, exchange


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who speaks, as Flower's own process would have set it."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)


SHAPES = {"a": (2,), "b": (3,)}
GOOD = {"a": torch.ones(2), "b": torch.zeros(3)}


class Link:
    """Stands for the way to the sites: hands out prepared answers, by node, all at once and some of them twice."""

    def __init__(self, answers: dict[int, list[dict[str, Tensor] | Error]]) -> None:
        self._answers = answers
        self._ready: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identities = []
        for message in messages:
            identity = f"message-{message.metadata.dst_node_id}"
            message.metadata.__dict__["_message_id"] = identity
            identities.append(identity)
            for answer in self._answers.get(message.metadata.dst_node_id, []):
                if isinstance(answer, Error):
                    self._ready.append(Message(answer, reply_to=message))
                else:
                    content = RecordDict({"words": ConfigRecord({}), "tensors": ArrayRecord(dict(answer))})
                    self._ready.append(Message(content, reply_to=message))
        return identities

    def pull_messages(self, identities: Iterable[str]) -> list[Message]:
        ready, self._ready = self._ready, []
        return ready


def ask(answers: dict[int, list[dict[str, Tensor] | Error]], largest: float = 100.0) -> Outcome:
    messages = build_messages("train", [1, 2], lambda _: {}, lambda _: {}, "round-1", 60.0)
    return exchange(cast(Grid, Link(answers)), "train", messages, 0.5, lambda _: SHAPES, largest)


GARBAGE: dict[str, tuple[dict[str, Tensor] | Error, str]] = {
    "not finite": ({**GOOD, "a": torch.tensor([1.0, float("nan")])}, "not finite"),
    "infinite": ({**GOOD, "a": torch.tensor([1.0, float("inf")])}, "not finite"),
    "shape": ({**GOOD, "a": torch.ones(3)}, "shape"),
    "dtype": ({**GOOD, "a": torch.ones(2, dtype=torch.float64)}, "float64"),
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


def test_exchange_counts_a_reply_once() -> None:
    outcome = ask({1: [GOOD, {**GOOD, "a": torch.full((2,), 7.0)}], 2: [GOOD]})
    assert torch.equal(outcome.replies[1].tensors["a"], GOOD["a"])
    assert set(outcome.replies) == {1, 2}
    assert not outcome.missing


def test_exchange_names_a_site_that_is_silent() -> None:
    outcome = ask({1: [GOOD]})
    assert set(outcome.replies) == {1}
    assert outcome.missing == {2: "did not answer in time"}


def test_exchange_lets_the_largest_honest_norm_pass() -> None:
    assert set(ask({1: [GOOD], 2: [GOOD]}, largest=2.0**0.5 + 1e-9).replies) == {1, 2}
    assert not ask({1: [GOOD], 2: [GOOD]}, largest=2.0**0.5 - 1e-6).replies
