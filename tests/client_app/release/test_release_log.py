"""The log of what left: append-only, chained, durable, and equal to what the ledger committed."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from client_app.release.log import ReleaseLog
from common.errors import LedgerError
from common.privacy.events import gaussian

EVENTS = [gaussian(3.0, label="step").to_json()]


def fill(path: Path, count: int = 4, run_id: str = "run") -> ReleaseLog:
    log = ReleaseLog(path)
    for number in range(count):
        log.append(run_id, f"round-{number}", EVENTS, f"{run_id}{number}".ljust(64, "0"), 1000 + number)
    return log


def test_append_keeps_every_field_in_order(tmp_path: Path) -> None:
    log = fill(tmp_path / "releases.jsonl")
    releases = log.read()
    assert [release.place for release in releases] == [1, 2, 3, 4]
    assert [release.round_key for release in releases] == [f"round-{number}" for number in range(4)]
    assert releases[2].payload_bytes == 1002
    assert releases[2].events == tuple(EVENTS)
    assert releases[2].at <= releases[3].at
    assert log.verify() == 4


def test_append_of_a_payload_sent_again_is_one_line(tmp_path: Path) -> None:
    log = fill(tmp_path / "releases.jsonl")
    again = log.append("run", "round-1", EVENTS, "run1".ljust(64, "0"), 1001)
    assert again == log.read()[1]
    assert log.verify() == 4
    log.append("run", "round-1", EVENTS, "f" * 64, 1001)  # another payload of that round is another release
    assert log.verify() == 5


@pytest.mark.parametrize("place", [0, 1, 3])
def test_verify_finds_a_changed_line(tmp_path: Path, place: int) -> None:
    path = tmp_path / "releases.jsonl"
    log = fill(path)
    lines = path.read_text().splitlines()
    values = json.loads(lines[place])
    values["payload_bytes"] += 1
    lines[place] = json.dumps(values, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match=f"altered at line {place + 1}:"):
        log.verify()
    with pytest.raises(LedgerError, match="altered"):
        log.append("run", "round-9", EVENTS, "9" * 64, 1)


@pytest.mark.parametrize("order", [[0, 2, 3], [1, 2, 3], [0, 2, 1, 3], [0, 1, 1, 2, 3]])
def test_verify_finds_removed_and_exchanged_lines(tmp_path: Path, order: list[int]) -> None:
    path = tmp_path / "releases.jsonl"
    log = fill(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[place] for place in order) + "\n")
    with pytest.raises(LedgerError, match="altered at line"):
        log.verify()


def test_verify_finds_a_release_that_was_never_committed(tmp_path: Path) -> None:
    log = fill(tmp_path / "releases.jsonl")
    committed = frozenset(release.payload_digest for release in log.read())
    assert log.verify(committed) == 4
    with pytest.raises(LedgerError, match=r"line 4: .*never committed"):
        log.verify(committed - {log.read()[3].payload_digest})


def test_append_after_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "releases.jsonl"
    log = fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"place": 5, "at": "2026-')
    assert log.verify() == 4
    log.append("run", "round-9", EVENTS, "9" * 64, 1)
    assert log.verify() == 5
    assert path.read_bytes().startswith(whole)


def _fill_in_process(path: Path, run_id: str) -> None:
    fill(path, 10, run_id)


def test_append_by_several_processes_keeps_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "releases.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_fill_in_process, args=(path, name)) for name in ("a", "b", "c")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert ReleaseLog(path).verify() == 30


def test_append_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "releases.jsonl").mkdir()
    with pytest.raises(LedgerError, match="nothing is sent"):
        fill(tmp_path / "releases.jsonl")
