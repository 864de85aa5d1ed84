"""Replies that depend on records leave on the schedule that the site set, and no sooner."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from client_app.app import app
from client_app.release import last_resort, schedule
from tests.harness import Federation, HarnessSite, changed, words_of

STEP = 1.2


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    federation = Federation.create(tmp_path_factory.mktemp("ran"), 1)
    federation.run(num_rounds=1)
    return federation


def timed(site: HarnessSite, message: Message, step: object) -> tuple[Message, float]:
    config = {"data-dir": str(site.folder), "site-name": site.name, "reply-seconds": step}
    start = time.monotonic()
    reply = app(message, Context(1, site.node, config, RecordDict(), {}))  # type: ignore[arg-type]
    return reply, time.monotonic() - start


class Clock:
    """The schedule's own clock, which notes what it was asked: a crowded machine wakes a process later than that."""

    def __init__(self, events: list[str]) -> None:
        self._events, self._now, self.leaves = events, 0.0, 0.0

    def monotonic(self) -> float:
        self._now = time.monotonic()
        return self._now

    def sleep(self, seconds: float) -> None:
        self._events.append("waits")
        self.leaves = self._now + seconds
        time.sleep(seconds)


@pytest.mark.parametrize("slow", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["query.statistics", "train"])
def test_reply_leaves_on_the_schedule_and_no_sooner(
    tmp_path: Path, ran: Federation, kind: str, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, wait = last_resort.training_data, schedule.wait_for_turn
    events: list[str] = []
    clock, came = Clock(events), []

    def read(*arguments: object) -> object:
        events.append("reads")
        time.sleep(slow)
        return real(*arguments)  # type: ignore[arg-type]

    def waiting(arrived: float, step: float) -> None:
        came.append(arrived)
        wait(arrived, step)

    monkeypatch.setattr("client_app.release.last_resort.training_data", read)
    monkeypatch.setattr("client_app.release.schedule.time", clock)
    monkeypatch.setattr("client_app.app.wait_for_turn", waiting)
    reply, seconds = timed(Federation.create(tmp_path, 1).sites[0], ran.asked(kind, "site-1"), STEP)
    assert "error" not in words_of(reply)
    assert seconds >= STEP
    steps = (clock.leaves - came[0]) / STEP
    assert round(steps) >= 1
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert events == ["reads", "waits"]


@pytest.mark.parametrize("kind", ["keys", "shares", "check", "masked", "unmask"])
def test_what_waits_for_a_run_s_lock_leaves_on_the_schedule_too(tmp_path: Path, ran: Federation, kind: str) -> None:
    """Sent beside a scheduled message of the same run, it would be answered when that one's step is done."""
    message = changed(ran.asked("train", "site-1"))
    message.metadata.__dict__["_message_type"] = f"query.secagg_{kind}"
    reply, seconds = timed(Federation.create(tmp_path, 1).sites[0], message, STEP)
    assert words_of(reply)["error"] == "config"
    assert seconds >= STEP


def test_step_that_takes_longer_leaves_at_the_next_multiple(
    tmp_path: Path, ran: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = last_resort.training_data

    def slowly(*arguments: object) -> object:
        time.sleep(STEP)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("client_app.release.last_resort.training_data", slowly)
    _, seconds = timed(Federation.create(tmp_path, 1).sites[0], ran.asked("train", "site-1"), STEP)
    assert seconds >= 2 * STEP


def test_other_replies_and_sites_without_a_schedule_answer_at_once(tmp_path: Path, ran: Federation) -> None:
    site = Federation.create(tmp_path, 1).sites[0]
    for kind, step in (("query.hello", 30.0), ("train", 0.0), ("train", 0)):
        reply, seconds = timed(site, ran.asked(kind, "site-1"), step)
        assert "error" not in words_of(reply)
        assert seconds < 30.0


@pytest.mark.parametrize("step", [-1.0, 1e9, float("nan"), "soon", True])
def test_schedule_that_is_none_is_refused(tmp_path: Path, ran: Federation, step: object) -> None:
    site = Federation.create(tmp_path, 1).sites[0]
    reply, _ = timed(site, ran.asked("train", "site-1"), step)
    assert words_of(reply)["error"] == "config"
    assert "reply_seconds" in site.log()
    assert site.entries() == 1
