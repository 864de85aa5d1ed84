"""A site at work: killed anywhere, asked twice, skipped, with a bad ledger or a full disk. Charged first, always."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from client_app import records as data
from client_app.answers import training as work
from common.methods.base import StepInput
from common.privacy.events import PrivacyEvent
from tests.harness import Federation, Handler, HarnessSite, Killed, changed, deliver, make_set, words_of

Tensors = Mapping[str, Tensor]


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensors]]:
    """The private state that each round of the first site began with, by round number; one for each attempt."""
    seen: dict[int, list[Tensors]] = {}
    original = work.get_method

    def spying(name: str) -> Any:
        method = original(name)

        def step(context: Any, step_input: StepInput) -> Any:
            if step_input.site_index == 0:
                seen.setdefault(step_input.round_index + 1, []).append(dict(step_input.site.tensors))
            return method.client_step(context, step_input)

        return replace(method, client_step=step)

    monkeypatch.setattr(work, "get_method", spying)
    return seen


class KillAt:
    """Kills the first site at a place in its code, in certain rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str, rounds: set[int]) -> None:
        self._monkeypatch, self._target, self._rounds = monkeypatch, target, rounds

    def __call__(self, site: HarnessSite, message: Message, handler: Handler) -> Message:
        number = int(message.content.config_records["words"].get("round", -1)) + 1
        if site.name != "site-1" or number not in self._rounds:
            return handler()
        with self._monkeypatch.context() as patch:
            patch.setattr(self._target, _die)
            return handler()


def _die(*_: object, **__: object) -> None:
    raise Killed


def same(one: Tensors, other: Tensors) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def counts(events: tuple[PrivacyEvent, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for event in events:
        found[event.label] = found.get(event.label, 0) + event.count
    return found


def only_run(site: HarnessSite) -> Any:
    (run,) = site.runs().values()
    return run


PLACES = {
    "while computing": "client_app.release.release.payload_of",
    "before the commit": "client_app.ledger.ledger.Ledger.commit",
    "before the log": "client_app.release.granted.ReleaseLog.append",
    "before the charge": "client_app.ledger.ledger.Ledger.reserve",
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_round_is_charged_if_the_data_was_read(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.create(tmp_path, 2)
    summary = federation.run(num_rounds=3, tamper=KillAt(monkeypatch, PLACES[place], {2}))
    assert summary["rounds_taken_part"] == [["site-1", "site-2"], ["site-2"], ["site-1", "site-2"]]
    charged = counts(only_run(federation.sites[0]).charged)["training"]
    assert charged == (2 if place == "before the charge" else 3)
    log = [release.round_key for release in federation.sites[0].releases()]
    assert log == ["statistics", "round-1", "round-3"]


def test_state_of_an_uncommitted_round_does_not_count(
    tmp_path: Path, states: dict[int, list[Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between saving its state and the commit: the next round goes on from the last committed one."""
    federation = Federation.create(tmp_path, 2)
    federation.run(num_rounds=4, tamper=KillAt(monkeypatch, PLACES["before the commit"], {2}))
    assert same(states[3][0], states[2][0])
    assert not same(states[4][0], states[3][0])


def test_state_survives_kills_in_a_row(
    tmp_path: Path, states: dict[int, list[Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two uncommitted states in a row must not push the last committed one out."""
    federation = Federation.create(tmp_path, 2)
    federation.run(num_rounds=5, tamper=KillAt(monkeypatch, PLACES["before the commit"], {2, 3, 4}))
    assert not same(states[2][0], states[1][0])
    for number in (3, 4, 5):
        assert same(states[number][0], states[2][0])


def test_round_that_comes_again_after_a_kill_starts_from_the_same_state(
    tmp_path: Path, states: dict[int, list[Tensors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.create(tmp_path, 1)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=2, tamper=KillAt(monkeypatch, PLACES["before the commit"], {2}))
    site = federation.sites[0]
    reply = deliver(site, federation.asked("train", "site-1"))
    assert reply.content.array_records
    assert same(states[2][1], states[2][0])
    run = only_run(site)
    assert run.rounds["round-2"].attempts == 2
    assert counts(run.charged) == {"statistics": 1, "training": 3}


def test_site_that_missed_rounds_goes_on_from_its_last(tmp_path: Path, states: dict[int, list[Tensors]]) -> None:
    def absent(site: HarnessSite, message: Message, handler: Handler) -> Message | None:
        if site.name == "site-1" and int(message.content.config_records["words"].get("round", -1)) in (1, 2):
            raise Killed
        return handler()

    federation = Federation.create(tmp_path, 2)
    federation.run(num_rounds=5, tamper=absent)
    assert sorted(states) == [1, 4, 5]
    assert not same(states[4][0], states[1][0])
    assert counts(only_run(federation.sites[0]).charged)["training"] == 3


@pytest.mark.parametrize("kind", ["query.statistics", "train"])
def test_message_delivered_twice_gets_the_same_bytes_and_one_charge(tmp_path: Path, kind: str) -> None:
    federation = Federation.create(tmp_path, 1)

    def twice(site: HarnessSite, message: Message, handler: Handler) -> Message:
        first = handler()
        if message.metadata.message_type == kind:
            before = site.entries()
            again = handler()
            assert _bytes(again) == _bytes(first)
            assert site.entries() == before
        return first

    federation.run(num_rounds=2, tamper=twice)
    assert counts(only_run(federation.sites[0]).charged) == {"statistics": 1, "training": 2}
    assert len(federation.sites[0].releases()) == 3


def _bytes(reply: Message) -> dict[str, bytes]:
    return {name: array.data for name, array in reply.content.array_records["tensors"].items()}


def test_release_killed_after_its_commit_is_sent_later_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.create(tmp_path, 1)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1, tamper=KillAt(monkeypatch, PLACES["before the log"], {1}))
    site = federation.sites[0]
    committed = only_run(site).rounds["round-1"].payload_digest
    deliver(site, federation.asked("train", "site-1"))
    assert site.releases()[-1].payload_digest == committed
    assert counts(only_run(site).charged) == {"statistics": 1, "training": 1}


def test_charge_lies_on_the_disk_before_a_record_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.create(tmp_path, 1)
    found: list[int] = []
    original = data.load_records

    def reading(*arguments: Any) -> Any:
        found.append(len(only_run(federation.sites[0]).charged))
        return original(*arguments)

    monkeypatch.setattr(data, "load_records", reading)
    federation.run(num_rounds=2)
    assert found == [1, 2, 3]


def test_same_run_under_other_settings_is_refused(tmp_path: Path) -> None:
    """A run's name stands for its declared events: with others, the ledger refuses, and charges nothing."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=1, run_name="trial")
    charged = only_run(federation.sites[0]).charged
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1, run_name="trial", sampling_rate=0.4)
    assert "refused: policy:run_name" in federation.status()["error"]
    assert only_run(federation.sites[0]).charged == charged


def payloads(federation: Federation) -> list[list[bytes]]:
    """The tensors of every release that the site sent, statistics and rounds, in order."""
    return [
        [array.data for _, array in sorted(seen.message.content.array_records["tensors"].items())]
        for seen in federation.sent("site-1")
        if seen.message.content.array_records and seen.kind in ("query.statistics", "train")
    ]


# the events are the same in each: the ledger alone would take them for the same run
@pytest.mark.parametrize("settings", [{"seed": 7}, {"clip_norm": 0.7}, {"latent_dim": 3}])
def test_name_of_a_run_used_again_with_other_settings_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Else the first run's releases would be sent as the second's, and its code would go on from the first's."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=1, run_name="trial")
    charged, sent = only_run(federation.sites[0]).charged, len(payloads(federation))
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1, run_name="trial", **settings)
    told = federation.status()["error"]
    assert "refused: policy:run_name" in told
    assert "another run-name" in told
    assert only_run(federation.sites[0]).charged == charged
    assert len(payloads(federation)) == sent


# a run without rounds: its one release is never followed by another, so the site keeps its bytes
ONE_RELEASE: dict[str, Any] = {"method": "dp_gauss", "run_name": "trial"}


def test_name_of_a_run_without_that_check_gets_the_old_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with both checks taken out, a run with other settings gets the first one's bytes."""
    monkeypatch.setattr("client_app.state.private_state.PrivateState.claim", lambda *_: None)
    monkeypatch.setattr("client_app.ledger.ledger.check_settings", lambda *_: None)
    federation = Federation.create(tmp_path, 1, allowed_methods=("dp_gauss",))
    federation.run(**ONE_RELEASE)
    first = payloads(federation)
    federation.run(**ONE_RELEASE)
    assert first
    assert payloads(federation) == first + first


def test_name_of_a_run_used_again_with_the_same_settings_gets_the_same_releases(tmp_path: Path) -> None:
    """As when a server lost its folder: folders and patience may differ, nothing is charged twice."""
    federation = Federation.create(tmp_path, 1, allowed_methods=("dp_gauss",))
    federation.run(**ONE_RELEASE)
    charged, first = only_run(federation.sites[0]).charged, payloads(federation)
    federation.run(**ONE_RELEASE, round_timeout=33.0, run_id=2)
    assert payloads(federation) == first + first
    assert only_run(federation.sites[0]).charged == charged


def test_one_record_site_takes_part_unnoticed(tmp_path: Path) -> None:
    """A site with one record answers like any other: same names, same sizes, same charge."""
    federation = Federation.create(tmp_path, 2, sets={0: make_set(1)})
    summary = federation.run(num_rounds=2)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]] * 2
    for small, large in zip(federation.sent("site-1"), federation.sent("site-2"), strict=True):
        assert len(small.wire) == len(large.wire)


def test_patient_with_more_records_than_the_cap_is_subsampled(tmp_path: Path) -> None:
    """One patient has all records of the site: capped, clipped as one unit, not refused."""
    records = replace(make_set(60), groups=np.zeros(60, dtype=np.int64))
    others = make_set(60, seed=1, patients=True)
    settings = {"unit": "patient", "max_records_per_patient": 2}
    federation = Federation.create(tmp_path, 2, sets={0: records, 1: others}, **settings)
    summary = federation.run(num_rounds=1, **settings)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]]
    assert summary["privacy"]["unit"] == "patient"


def test_public_site_logs_what_leaves_without_charge(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 1, data_is_public=True, metrics_may_leave=True)
    summary = federation.run(num_rounds=1)
    assert summary["scores"]["synthetic_only"]["accuracy"] >= 0.0
    assert [release.round_key for release in federation.sites[0].releases()] == [
        "statistics",
        "round-1",
        "evaluate",
    ]


def test_run_without_noise_at_a_public_site_keeps_its_state(tmp_path: Path, states: dict[int, list[Tensors]]) -> None:
    public = {"data_is_public": True, "metrics_may_leave": True}
    federation = Federation.create(tmp_path, 1, **public)
    federation.run(num_rounds=3, epsilon=float("inf"))
    assert not same(states[2][0], states[1][0])
    assert not same(states[3][0], states[2][0])
    assert federation.sites[0].entries() == 1


def test_changed_message_of_the_same_round_gets_the_committed_bytes(tmp_path: Path) -> None:
    """Other parameters for a committed round buy no second look at the records."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=1)
    site, message = federation.sites[0], federation.asked("train", "site-1")
    first = federation.sent("site-1", "train")[-1].message
    other = changed(message)
    asked = other.content.array_records["tensors"].to_torch_state_dict()
    other.content["tensors"] = ArrayRecord({name: value * 0.5 for name, value in asked.items()})
    assert _bytes(deliver(site, other)) == _bytes(first)
    reply = deliver(site, changed(message, {"config": {"learning-rate": 1.0}}))
    assert words_of(reply)["error"] == "policy:run_name"
