"""Replies that depend on records leave on the schedule that the site set, and no sooner."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from client_app.app import app
from client_app.release import last_resort
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


@pytest.mark.parametrize("kind", ["query.statistics", "train"])
def test_reply_leaves_on_the_schedule_and_no_sooner(
    tmp_path: Path, ran: Federation, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = last_resort.training_data

    def slowly(*arguments: object) -> object:
        time.sleep(0.3)
        return real(*arguments)  # type: ignore[arg-type]

    for number, reader in enumerate((real, slowly)):
        site = Federation.create(tmp_path / str(number), 1).sites[0]
        monkeypatch.setattr("client_app.release.last_resort.training_data", reader)
        reply, seconds = timed(site, ran.asked(kind, "site-1"), STEP)
        assert "error" not in words_of(reply)
        late = seconds / STEP - round(seconds / STEP)
        assert seconds >= STEP
        assert 0.0 <= late < 0.2


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
        assert seconds < 15.0


@pytest.mark.parametrize("step", [-1.0, 1e9, float("nan"), "soon", True])
def test_schedule_that_is_none_is_refused(tmp_path: Path, ran: Federation, step: object) -> None:
    site = Federation.create(tmp_path, 1).sites[0]
    reply, _ = timed(site, ran.asked("train", "site-1"), step)
    assert words_of(reply)["error"] == "config"
    assert "reply_seconds" in site.log()
    assert site.entries() == 1
