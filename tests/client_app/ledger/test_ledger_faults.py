"""A ledger damaged, changed, rolled back, locked, read-only or on a full disk: nothing may be released."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client_app.ledger import upkeep
from client_app.ledger.chain import NO_PREVIOUS, Head, check_chain, make_entry
from client_app.ledger.ledger import Ledger
from client_app.ledger.limits import BudgetLimits
from client_app.ledger.store import LOCK_TIMEOUT_S, open_store
from common.errors import FedHypeVAEError, LedgerError
from common.privacy.composition import epsilon_pld
from common.privacy.events import gaussian

LIMITS = BudgetLimits(lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=2.0)
PLAN = (gaussian(50.0, count=100),)
ROUND = (gaussian(50.0),)
COHORT = "cohort-1"
ROUNDS = 6
COPIED = "at, kind, run_id, round_key, body, previous, 'x' FROM entries"


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ledger of a few rounds and its witness; copied by each test."""
    folder = tmp_path_factory.mktemp("used")
    with Ledger.create(folder / "ledger.db", COHORT, folder / "witness.json") as ledger:
        ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
        for number in range(ROUNDS):
            spend(ledger, number)
    return folder


@pytest.fixture
def site(used: Path, tmp_path: Path) -> Path:
    """A copy of the used ledger."""
    return Path(shutil.copytree(used, tmp_path / "site"))


def spend(ledger: Ledger, number: int) -> None:
    reservation = ledger.reserve("run", f"round-{number}", ROUND, limits=LIMITS, fingerprint="f")
    ledger.commit(reservation, f"{number:064d}")


def open_ledger(site: Path, **options: Any) -> Ledger:
    return Ledger.open(site / "ledger.db", COHORT, site / "witness.json", **options)


def charged_count(site: Path) -> int:
    with open_ledger(site) as ledger:
        return sum(event.count for event in ledger.runs["run"].charged)


def tamper(site: Path, *statements: str) -> None:
    """What somebody with the file and SQLite can do, triggers and all."""
    connection = sqlite3.connect(site / "ledger.db", isolation_level=None)
    connection.execute("DROP TRIGGER entries_no_update")
    connection.execute("DROP TRIGGER entries_no_delete")
    for statement in statements:
        connection.execute(statement)
    connection.close()


def in_child(work: Callable[[], Any]) -> Any:
    """Run `work` in a child process that may lose rights; its result, or the error it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = work()
        except FedHypeVAEError as error:
            result = error
        os.write(writer, pickle.dumps(result))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    os.waitpid(child, 0)
    return pickle.loads(content)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = '{}' WHERE seq = 3",
        "DELETE FROM entries WHERE seq = 3",
        "INSERT OR REPLACE INTO entries SELECT 3, at, kind, run_id, round_key, body, previous, 'x' FROM "
        "entries WHERE seq = 3",
    ],
)
def test_ledger_is_append_only_for_sqlite(site: Path, statement: str) -> None:
    connection = sqlite3.connect(site / "ledger.db", isolation_level=None)
    connection.execute("PRAGMA recursive_triggers=ON")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "place"),
    [
        ("UPDATE entries SET body = replace(body, '50.0', '500.0') WHERE seq = 3", 3),
        ("UPDATE entries SET at = '2020-01-01T00:00:00.000+00:00' WHERE seq = 5", 5),
        ("UPDATE entries SET round_key = 'round-9' WHERE seq = 4", 4),
        ("UPDATE entries SET kind = 'close' WHERE seq = 6", 6),
        ("DELETE FROM entries WHERE seq = 4", 4),
        ("DELETE FROM entries WHERE seq = 1", 1),
        (
            f"INSERT INTO entries SELECT 0, {COPIED} LIMIT 1",
            1,
        ),
        (
            f"INSERT INTO entries SELECT 99, {COPIED} LIMIT 1",
            15,
        ),
    ],
)
def test_ledger_changed_row_is_found_and_named(site: Path, statement: str, place: int) -> None:
    tamper(site, statement)
    for witness in (site / "witness.json", None):
        with pytest.raises(LedgerError, match=f"altered at entry {place}:"):
            Ledger.open(site / "ledger.db", COHORT, witness)


def test_check_chain_refuses_a_gap_with_valid_digests() -> None:
    first = make_entry(1, "genesis", "", "", {"cohort_id": COHORT}, NO_PREVIOUS)
    check_chain(Path("ledger"), [], [first, make_entry(2, "close", "run", "", {}, first.digest)])
    with pytest.raises(LedgerError, match="altered at entry 2:"):
        check_chain(Path("ledger"), [], [first, make_entry(3, "close", "run", "", {}, first.digest)])
    with pytest.raises(LedgerError, match="altered at entry 2:"):
        check_chain(Path("ledger"), [first], [make_entry(2, "close", "run", "", {}, NO_PREVIOUS)])
    with pytest.raises(LedgerError, match="does not begin"):
        check_chain(Path("ledger"), [], [make_entry(1, "close", "run", "", {}, NO_PREVIOUS)])


@pytest.mark.parametrize(
    ("kind", "run_id", "body"),
    [
        ("commit", "run", {"reservation": 1, "payload_digest": "0" * 64}),
        ("reserve", "undeclared", {"events": [], "fingerprint": "f"}),
        ("reserve", "run", {"events": ["nonsense"], "fingerprint": "f"}),
        ("gift", "run", {}),
    ],
)
def test_ledger_entries_that_make_no_sense_are_refused(site: Path, kind: str, run_id: str, body: Any) -> None:
    """Chained as they should be, but no ledger could have written them."""
    store = open_store(site / "ledger.db", None)
    with store.writing():
        store.append(kind, run_id, "round-99", body)
    store.close()
    with pytest.raises(LedgerError, match=f"entry {3 + 2 * ROUNDS} .* makes no sense"):
        Ledger.open(site / "ledger.db", COHORT)


def test_ledger_deleted_last_row_is_a_rollback(site: Path) -> None:
    tamper(site, f"DELETE FROM entries WHERE seq = {2 + 2 * ROUNDS}")
    with pytest.raises(LedgerError, match="rolled back"):
        open_ledger(site)


def test_ledger_rewritten_with_a_valid_chain_is_found_by_witness_and_receipt(site: Path) -> None:
    with open_ledger(site) as ledger:
        receipt = ledger.head
    (site / "ledger.db").unlink()
    with Ledger.create(site / "ledger.db", COHORT) as forged:
        forged.declare_run("run", PLAN, LIMITS, fingerprint="f")
        for number in range(ROUNDS + 1):
            spend(forged, number)
        with pytest.raises(LedgerError, match="rewritten"):
            forged.verify(receipt)
    with pytest.raises(LedgerError, match="rewritten"):
        open_ledger(site)


def test_ledger_rolled_back_file_is_found_by_witness_and_receipt(site: Path) -> None:
    shutil.copy(site / "ledger.db", site / "old.db")
    with open_ledger(site) as ledger:
        spend(ledger, ROUNDS)
        receipt = ledger.head
    shutil.copy(site / "old.db", site / "ledger.db")
    with pytest.raises(LedgerError, match="rolled back"):
        open_ledger(site)
    with (
        Ledger.open(site / "ledger.db", COHORT) as unwitnessed,
        pytest.raises(LedgerError, match="rolled back"),
    ):
        unwitnessed.verify(receipt)


def test_ledger_lost_write_ahead_log_is_a_rollback(site: Path, tmp_path: Path) -> None:
    with open_ledger(site) as ledger:
        spend(ledger, ROUNDS)  # lies in the log only, as after a power cut
        broken = tmp_path / "broken"
        broken.mkdir()
        shutil.copy(site / "ledger.db", broken)
        shutil.copy(site / "witness.json", broken)
        assert (site / "ledger.db-wal").stat().st_size > 0
    with pytest.raises(LedgerError, match="rolled back"):
        open_ledger(broken)


def test_ledger_rolled_back_while_open_is_found(site: Path) -> None:
    with open_ledger(site) as ledger:
        connection = sqlite3.connect(site / "ledger.db", isolation_level=None)
        connection.execute("DROP TRIGGER entries_no_delete")
        connection.execute("DELETE FROM entries WHERE seq > 4")
        connection.close()
        with pytest.raises(LedgerError, match="changed or rolled back"):
            spend(ledger, ROUNDS)


@pytest.mark.parametrize("kept", [0.0, 0.004, 0.3, 0.6, 0.99])
def test_ledger_truncated_file_is_refused(site: Path, kept: float) -> None:
    with (site / "ledger.db").open("r+b") as stream:
        stream.truncate(int(kept * (site / "ledger.db").stat().st_size))
    for witness in (site / "witness.json", None):
        with pytest.raises(LedgerError):
            Ledger.open(site / "ledger.db", COHORT, witness)


def test_ledger_flipped_bytes_are_refused_or_without_effect(site: Path) -> None:
    """Whatever single byte is damaged: the ledger says the same as before, or it is refused."""
    content = (site / "ledger.db").read_bytes()
    with open_ledger(site) as ledger:
        before = upkeep.export(ledger)
    picked = random.Random(5)
    refused = 0
    for place in picked.sample(range(len(content)), 150):
        damaged = bytearray(content)
        damaged[place] ^= 1 << picked.randrange(8)
        for leftover in ("ledger.db-wal", "ledger.db-shm"):
            (site / leftover).unlink(missing_ok=True)
        (site / "ledger.db").write_bytes(damaged)
        try:
            with open_ledger(site) as ledger:
                assert upkeep.export(ledger) == before
        except LedgerError:
            refused += 1
    assert refused > 0


def test_ledger_missing_or_foreign_parts_are_refused(site: Path) -> None:
    (site / "witness.json").rename(site / "kept.json")
    with pytest.raises(LedgerError, match=r"witness .* is missing"):
        open_ledger(site)
    (site / "witness.json").write_text("not a witness")
    with pytest.raises(LedgerError):
        open_ledger(site)
    (site / "kept.json").replace(site / "witness.json")
    with pytest.raises(LedgerError, match="cohort 'cohort-1', expected 'cohort-2'"):
        Ledger.open(site / "ledger.db", "cohort-2", site / "witness.json")
    with Ledger.create(site / "other.db", "cohort-2"):
        pass
    with pytest.raises(LedgerError, match="belongs to cohort"):
        Ledger.open(site / "other.db", "cohort-2", site / "witness.json")
    (site / "ledger.db").rename(site / "gone.db")
    for create in (False, True):  # a lost ledger is never made anew while its witness is there
        with pytest.raises(LedgerError):
            open_ledger(site, create=create)


def test_ledger_is_created_once(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no privacy ledger"):
        Ledger.open(tmp_path / "ledger.db", COHORT)
    with Ledger.open(tmp_path / "ledger.db", COHORT, tmp_path / "witness.json", create=True) as ledger:
        ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    with Ledger.open(tmp_path / "ledger.db", COHORT, tmp_path / "witness.json", create=True) as ledger:
        assert list(ledger.runs) == ["run"]
    with pytest.raises(LedgerError, match="there is, or was"):
        Ledger.create(tmp_path / "ledger.db", COHORT, tmp_path / "witness.json")
    with pytest.raises(LedgerError, match="permanent id"):
        Ledger.create(tmp_path / "nameless.db", "")


def test_ledger_accepted_witness_takes_the_ledger_as_it_stands(site: Path) -> None:
    (site / "witness.json").unlink()
    with Ledger.open(site / "ledger.db", COHORT) as ledger:
        upkeep.accept_witness(ledger, site / "witness.json")
    with open_ledger(site) as ledger:
        spend(ledger, ROUNDS)
    assert json.loads((site / "witness.json").read_text())["seq"] == 4 + 2 * ROUNDS


def test_ledger_locked_by_another_is_refused_in_bounded_time(site: Path) -> None:
    before = charged_count(site)
    holder = sqlite3.connect(site / "ledger.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with open_ledger(site, timeout_s=0.3) as ledger:
            start = time.monotonic()
            with pytest.raises(LedgerError, match="locked"):
                spend(ledger, ROUNDS)
            assert time.monotonic() - start < 0.9 * LOCK_TIMEOUT_S
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert charged_count(site) == before
    with open_ledger(site) as ledger:
        spend(ledger, ROUNDS)
    assert charged_count(site) == before + 1


def test_ledger_read_only_file_is_refused(site: Path) -> None:
    """As an ordinary user, since nothing is read-only for root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(site, folder, dirs_exist_ok=True)
        before = charged_count(folder)
        for path in (folder / "ledger.db", folder):
            path.chmod(0o444 if path.is_file() else 0o555)

        def use() -> str:
            if os.getuid() == 0:
                os.setuid(65534)
            with open_ledger(folder) as ledger:
                spend(ledger, ROUNDS)
            return "released"

        result = in_child(use)
        assert isinstance(result, LedgerError), result
        folder.chmod(0o755)
        (folder / "ledger.db").chmod(0o644)
        assert charged_count(folder) == before


@pytest.mark.parametrize("room", [0, 5_000, 9_000])
def test_ledger_full_disk_is_refused_and_nothing_lost(site: Path, room: int) -> None:
    """No file of the child may grow: SQLite gets the same error as from a disk without space."""
    before = charged_count(site)
    epsilon_pld(PLAN, LIMITS.lifetime_delta)

    def use() -> int:
        with open_ledger(site) as ledger:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            for number in range(ROUNDS, ROUNDS + 10):
                try:
                    spend(ledger, number)
                except LedgerError:
                    return number
        return -1

    stopped_at = in_child(use)
    assert stopped_at >= ROUNDS, stopped_at
    released = stopped_at - ROUNDS
    assert before + released <= charged_count(site) <= before + released + 1
    with open_ledger(site) as ledger:
        spend(ledger, 50)


def test_ledger_whose_witness_cannot_be_written_releases_nothing(site: Path) -> None:
    with open_ledger(site) as ledger:
        reservation = ledger.reserve("run", "round-9", ROUND, limits=LIMITS, fingerprint="f")
        (site / "witness.json").unlink()
        (site / "witness.json").mkdir()
        with pytest.raises(LedgerError):
            ledger.commit(reservation, "0" * 64)


@pytest.mark.parametrize("text", ["", "3", "x:" + "0" * 64, "3:abc", "²:" + "0" * 64])
def test_head_parse_refuses_other_forms(text: str) -> None:
    with pytest.raises(LedgerError, match="receipt"):
        Head.parse(text)
