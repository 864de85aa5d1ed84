"""The strategy under Flower's own `Strategy.start`, over real handlers: the same Φ and checks as by `run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from common.methods.base import ServerState
from server_app.checkpoint import load_checkpoint
from server_app.strategy import FederatedStrategy
from tests.harness import Federation, Handler, HarnessSite

PUBLIC = {"data_is_public": True, "metrics_may_leave": True, "allow_test_noise": True}
SEEDED: dict[str, Any] = {"noise": "test", "num_rounds": 3}
LIAR = "site-2"


@contextmanager
def flowers_loop(patch: pytest.MonkeyPatch, rounds: int) -> Iterator[list[ArrayRecord]]:
    """The server app starts the strategy by Flower's loop, with other arrays and more rounds than it has."""
    given: list[ArrayRecord] = []

    def start(self: FederatedStrategy, grid: Any) -> ServerState:
        given.append(self.start(grid, ArrayRecord({"other": torch.zeros(1)}), num_rounds=rounds).arrays)
        return self.state

    with patch.context() as patched:
        patched.setattr(FederatedStrategy, "run", start)
        yield given


def run(home: Path, patch: pytest.MonkeyPatch, tamper: Any = None, rounds: int = 3, **settings: Any) -> Federation:
    federation = Federation.create(home, 3, **PUBLIC)
    with flowers_loop(patch, rounds):
        federation.run(tamper=tamper, **{**SEEDED, **settings})
    return federation


def test_flowers_loop_gives_the_same_state_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Federation.create(tmp_path / "ours", 3, **PUBLIC)
    summary = ours.run(**SEEDED)
    theirs = run(tmp_path / "theirs", monkeypatch, rounds=5)
    states = [load_checkpoint(federation.output)[0] for federation in (ours, theirs)]
    assert states[0].round == states[1].round == 3
    assert states[0].params.keys() == states[1].params.keys()
    assert all(torch.equal(value, states[1].params[name]) for name, value in states[0].params.items())
    other = theirs.read("summary.json")
    for fact in ("rounds_taken_part", "bytes_up_per_site", "bytes_down_per_site", "scores"):
        assert other[fact] == summary[fact]
    assert other["privacy"]["epsilon_spent_per_site"] == summary["privacy"]["epsilon_spent_per_site"]


def test_flowers_loop_returns_the_parameters_of_the_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.create(tmp_path, 2, **PUBLIC)
    with flowers_loop(monkeypatch, 3) as given:
        federation.run(**SEEDED)
    params = load_checkpoint(federation.output)[0].params
    (arrays,) = given
    found = arrays.to_torch_state_dict()
    assert found.keys() == params.keys()
    assert all(torch.equal(found[name], value) for name, value in params.items())


def lie(change: Any) -> Any:
    """The liar's sums of the second round are others."""

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message:
        reply = handler()
        if site.name != LIAR or message.metadata.group_id != "round-2":
            return reply
        tensors = change(reply.content.array_records["tensors"].to_torch_state_dict())
        return Message(RecordDict({**reply.content, "tensors": ArrayRecord(tensors)}), reply_to=message)

    return tamper


LIES = {
    "huge": lambda tensors: {name: value + 1e20 for name, value in tensors.items()},
    "not finite": lambda tensors: {name: value / 0.0 for name, value in tensors.items()},
    "more": lambda tensors: {**tensors, "more": torch.zeros(1)},
    "nothing": lambda _: {},
}


@pytest.mark.parametrize("how", LIES)
def test_liar_under_flowers_loop_loses_the_round_and_nobody_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    summary = run(tmp_path, monkeypatch, lie(LIES[how])).read("summary.json")
    assert [len(sites) for sites in summary["rounds_taken_part"]] == [3, 2, 3]
    assert [(one["site"], one["when"]) for one in summary["refused_replies"]] == [(LIAR, "round 2")]


def test_reply_to_no_message_of_the_round_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a site answers for another, or an answer to an earlier round comes late."""

    def tamper(site: HarnessSite, message: Message, handler: Handler) -> Message:
        reply = handler()
        if site.name == LIAR and message.metadata.group_id == "round-2":
            reply.metadata.__dict__["_src_node_id"] = 101
        return reply

    summary = run(tmp_path, monkeypatch, tamper).read("summary.json")
    assert summary["rounds_missing"][1] == {LIAR: "did not answer in time"}
    assert summary["refused_replies"] == []


def test_too_few_sites_end_flowers_loop_and_the_run_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, lie(LIES["huge"]), min_sites=3)
    output = tmp_path / "outputs" / "run"
    assert "expected at least 3 sites, 2 answered" in (output / "status.json").read_text()
    assert load_checkpoint(output)[0].round == 1


def test_secure_sums_are_refused_under_flowers_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.secagg_cases import SHARED, keyed_federation

    federation = keyed_federation(tmp_path, 4)
    with flowers_loop(monkeypatch, 1), pytest.raises(SystemExit):
        federation.run(**SHARED)
    assert "by its own run()" in federation.status()["error"]
    assert all(not site.runs() for site in federation.sites)
