"""A site whose ledger is bad, whose disk is full or whose release log is broken releases nothing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from client_app.ledger.ledger import Ledger
from common.durable import write_atomically
from tests.harness import Federation, HarnessSite, deliver, words_of

Tensors = Mapping[str, Tensor]


def locked(site: HarnessSite) -> Callable[[], None]:
    connection = sqlite3.connect(site.folder / "ledger.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection.close


def truncated(site: HarnessSite) -> Callable[[], None]:
    path = site.folder / "ledger.db"
    os.truncate(path, path.stat().st_size // 2)
    return lambda: None


def emptied(site: HarnessSite) -> Callable[[], None]:
    os.truncate(site.folder / "ledger.db", 0)
    return lambda: None


def removed(site: HarnessSite) -> Callable[[], None]:
    (site.folder / "ledger.db").unlink()
    return lambda: None


def of_another_cohort(site: HarnessSite) -> Callable[[], None]:
    (site.folder / "ledger.db").unlink()
    Ledger.create(site.folder / "ledger.db", "somebody else").close()
    return lambda: None


@pytest.mark.parametrize("damage", [locked, truncated, emptied, removed, of_another_cohort])
def test_site_with_a_bad_ledger_releases_nothing(
    tmp_path: Path, damage: Callable[[HarnessSite], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation.create(tmp_path, 2)
    opened = Ledger.open
    hasty = staticmethod(lambda *args, **more: opened(*args, **{**more, "timeout_s": 0.2}))
    monkeypatch.setattr(Ledger, "open", hasty)
    mend = damage(federation.sites[0])
    try:
        summary = federation.run(num_rounds=1, num_sites=1)
    finally:
        mend()
    assert summary["rounds_taken_part"] == [["site-2"]]
    assert "refused: ledger" in summary["rounds_missing"][0]["site-1"]
    assert not any(seen.message.content.array_records for seen in federation.sent("site-1"))
    assert "LedgerError: " in federation.sites[0].log()
    assert federation.sites[0].releases() == ()


def test_site_with_a_rolled_back_ledger_releases_nothing(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 2, witness="witness.json")
    path = federation.sites[0].folder / "ledger.db"
    old = path.read_bytes()
    federation.run(num_rounds=1)
    sent = len(federation.sites[0].releases())
    for leftover in path.parent.glob("ledger.db-*"):
        leftover.unlink()
    path.write_bytes(old)
    federation.run(num_rounds=1, num_sites=1, run_id=2)
    assert "rolled back" in federation.sites[0].log()
    assert len(federation.sites[0].releases()) == sent


@pytest.mark.parametrize("target", ["common.durable.write_atomically", "client_app.release.log.os.pwrite"])
def test_full_disk_releases_nothing_and_loses_nothing(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round is charged, nothing leaves; once the disk is freed, the same round is answered."""

    def full(path: object, *rest: Any) -> None:
        # what is not the site's own is on another disk; and there was room for so little
        if isinstance(path, Path) and ("state" not in path.parts or path.name == "settings.sha256"):
            write_atomically(path, *rest)
            return
        raise OSError(28, "No space left on device")

    federation = Federation.create(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(SystemExit):
            federation.run(num_rounds=1)
    site = federation.sites[0]
    assert not any(seen.message.content.array_records for seen in federation.sent())
    assert "free the disk" in site.log()
    (run,) = site.runs().values()
    assert [(event.label, event.count) for event in run.charged] == [("statistics", 1)]
    assert "receipt" in words_of(deliver(site, federation.asked("query.statistics", "site-1")))


def test_disk_too_full_to_note_the_settings_charges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *rest: Any) -> None:
        if "state" in path.parts:
            raise OSError(28, "No space left on device")
        write_atomically(path, *rest)

    federation = Federation.create(tmp_path, 1)
    monkeypatch.setattr("common.durable.write_atomically", full)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1)
    assert "free the disk" in federation.sites[0].log()
    assert federation.sites[0].runs() == {}
    assert not any(seen.message.content.array_records for seen in federation.sent())


def test_broken_release_log_stops_the_site(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 2)
    federation.run(num_rounds=1)
    path = federation.sites[0].folder / "releases.jsonl"
    path.write_bytes(path.read_bytes().replace(b"statistics", b"Statistics", 1))
    summary = federation.run(num_rounds=1, num_sites=1, run_id=2)
    assert summary["rounds_taken_part"] == [["site-2"]]
    assert "altered at line 1" in federation.sites[0].log()
