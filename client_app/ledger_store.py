"""The file under the privacy ledger: an append-only, hash-chained table in SQLite, and a witness of its head.

What the entries mean is the business of `client_app.ledger`; here they are only kept: never changed
(triggers), never changed unseen (each entry's SHA-256 covers the one before), never rolled back unseen (the
head is also written to a second path, the witness), and on the disk before anybody goes on
(`synchronous=FULL`). Whatever goes wrong, SQLite's own errors included, comes out as a `LedgerError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client_app.durable import lock_file, sync_path, write_atomically
from common.errors import LedgerError

FORMAT = 1
LOCK_TIMEOUT_S = 20.0
_NO_PREVIOUS = "0" * 64
_ALL = -(2**62)  # below any place, so that an entry put before the first one is seen, too

_SCHEMA = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, run_id TEXT NOT NULL, round_key TEXT NOT
    NULL, body TEXT NOT NULL, previous TEXT NOT NULL, digest TEXT NOT NULL UNIQUE
) STRICT;
CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are
append-only'); END; CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT,
'entries are append-only'); END; CREATE UNIQUE INDEX one_commit_per_round ON entries (run_id, round_key) WHERE
kind = 'commit';
"""
_COLUMNS = "seq, at, kind, run_id, round_key, body, previous, digest"


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. `digest` is the SHA-256 of all the other fields in canonical form."""

    seq: int
    at: str
    kind: str
    run_id: str
    round_key: str
    body_json: str
    previous: str
    digest: str

    @property
    def body(self) -> dict[str, Any]:
        """The entry's content, decoded."""
        decoded: dict[str, Any] = json.loads(self.body_json)
        return decoded


@dataclass(frozen=True)
class Head:
    """The last entry's place and digest: the receipt that proves, later, how far the ledger had come."""

    seq: int
    digest: str

    def __str__(self) -> str:
        """`SEQ:DIGEST`, the form that `parse` reads."""
        return f"{self.seq}:{self.digest}"

    @staticmethod
    def parse(text: str) -> Head:
        """Read `SEQ:DIGEST`. Raises LedgerError if the text has another form."""
        seq, _, digest = text.strip().partition(":")
        if not seq.isdigit() or len(digest) != 64:
            raise LedgerError(f"a receipt has the form NUMBER:64-HEX-DIGITS, found {text!r}")
        return Head(int(seq), digest)


def _digest(fields: tuple[int, str, str, str, str, str, str]) -> str:
    """SHA-256 over the canonical form (a JSON array without spaces) of an entry's fields but the digest."""
    return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()


def _make_entry(
    seq: int, kind: str, run_id: str, round_key: str, body: Mapping[str, Any], previous: str
) -> Entry:
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    body_json = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = _digest((seq, at, kind, run_id, round_key, body_json, previous))
    return Entry(seq, at, kind, run_id, round_key, body_json, previous, digest)


def _row(entry: Entry) -> tuple[int | str, ...]:
    return (
        entry.seq, entry.at, entry.kind, entry.run_id, entry.round_key,
        entry.body_json, entry.previous, entry.digest,
    )  # fmt: skip


@contextmanager
def _as_ledger_errors(path: Path) -> Iterator[None]:
    """Turn every way a file can fail into one LedgerError that says what to do."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:
        raise LedgerError(
            f"privacy ledger {path} can't be used ({error}); nothing is released until it can: free the disk "
            "or the lock, check that the file can be written, or restore it and run `fedhypevae ledger "
            "verify`"
        ) from error


class EntryStore:
    """An open ledger file whose chain has been checked from its first entry."""

    def __init__(self, path: Path, connection: sqlite3.Connection, witness_path: Path | None) -> None:
        """Not for use outside this module: call `create_store` or `open_store`."""
        self.path = path
        self.witness_path = witness_path
        self._connection = connection
        self._entries: list[Entry] = []

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries as of the last read or write, first to last."""
        return tuple(self._entries)

    @property
    def head(self) -> Head:
        """Where the ledger stands as of the last read or write."""
        return Head(self._entries[-1].seq, self._entries[-1].digest)

    @property
    def cohort_id(self) -> str:
        """The permanent id written into the first entry."""
        return str(self._entries[0].body["cohort_id"])

    def refresh(self) -> None:
        """Read what others appended, check that it continues the chain, and hold it against the witness."""
        with _as_ledger_errors(self.path):
            # The witness is read first: it may only lag behind the file, so what it says must be found there.
            witness = _read_witness(self.witness_path)
            start = len(self._entries)
            rows = self._connection.execute(
                f"SELECT {_COLUMNS} FROM entries WHERE seq >= ? ORDER BY seq", (start if start > 0 else _ALL,)
            ).fetchall()
            found = [Entry(*row) for row in rows]
            if start > 0:
                if not found or found[0] != self._entries[-1]:
                    raise LedgerError(
                        f"privacy ledger {self.path} was changed or rolled back while it was open"
                    )
                found = found[1:]
            self._entries.extend(_checked_chain(self.path, self._entries, found))
            if not self._entries:
                raise LedgerError(f"{self.path} holds no ledger: it was emptied or truncated; restore it")
            self._check_witness(witness)

    def reread(self) -> None:
        """Forget what was read and check the whole chain from the first entry again."""
        self._entries.clear()
        self.refresh()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock; what is appended inside reaches the disk as one whole, or not at all."""
        with _as_ledger_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
        kept = 0
        try:
            self.refresh()
            kept = len(self._entries)
            yield
            with _as_ledger_errors(self.path):
                self._connection.execute("COMMIT")
        except BaseException:
            if kept > 0:
                del self._entries[kept:]
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self._write_witness()

    def append(self, kind: str, run_id: str, round_key: str, body: Mapping[str, Any]) -> Entry:
        """Append one entry; only inside `writing`. `body` holds finite JSON values."""
        if not self._connection.in_transaction:
            raise LedgerError("an entry can only be appended inside `writing`")
        with _as_ledger_errors(self.path):
            entry = _make_entry(self.head.seq + 1, kind, run_id, round_key, body, self.head.digest)
            self._connection.execute(
                f"INSERT INTO entries ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?)", _row(entry)
            )
        self._entries.append(entry)
        return entry

    def check_receipt(self, receipt: Head) -> None:
        """Hold the ledger against a head that was noted earlier elsewhere. Raises LedgerError if it does not fit."""
        if receipt.seq > self.head.seq:
            raise LedgerError(
                f"privacy ledger {self.path} was rolled back: it ends at entry {self.head.seq}, but entry "
                f"{receipt.seq} was witnessed; put the newest copy back, an older one forgets what was spent"
            )
        if receipt.seq < 1 or self._entries[receipt.seq - 1].digest != receipt.digest:
            raise LedgerError(
                f"privacy ledger {self.path} was rewritten: entry {receipt.seq} is not the one that was "
                "witnessed"
            )

    def copy_to(self, destination: Path) -> None:
        """Write a complete copy, without a write-ahead log beside it. Refuses to replace a file."""
        with _as_ledger_errors(destination):
            if destination.exists():
                raise LedgerError(f"{destination} exists already: give the copy a new name")
            partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
            partial.unlink(missing_ok=True)
            try:
                copy = sqlite3.connect(partial)
                try:
                    self._connection.backup(copy)
                    copy.execute("PRAGMA journal_mode=DELETE")
                finally:
                    copy.close()
                _place_new_file(partial, destination)
            finally:
                partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _check_witness(self, witness: Mapping[str, Any] | None) -> None:
        if self.witness_path is None:
            return
        if witness is None:
            if len(self._entries) > 1:
                raise LedgerError(
                    f"the ledger's witness {self.witness_path} is missing, so a rolled-back ledger could not "
                    "be told: put it back, or accept the ledger as it stands with `fedhypevae ledger witness`"
                )
            return
        if witness["cohort_id"] != self.cohort_id:
            raise LedgerError(
                f"witness {self.witness_path} belongs to another cohort than ledger {self.path}"
            )
        self.check_receipt(Head(int(witness["seq"]), str(witness["digest"])))

    def _write_witness(self, *, accept: bool = False) -> None:
        """Note the head at the second path, never going back. `accept` replaces a missing witness on request."""
        if self.witness_path is None:
            return
        with _as_ledger_errors(self.witness_path):
            with lock_file(self.witness_path.with_suffix(".lock"), timeout_s=LOCK_TIMEOUT_S):
                witness = _read_witness(self.witness_path)
                if witness is not None and int(witness["seq"]) >= self.head.seq and not accept:
                    return
                note = {"cohort_id": self.cohort_id, "seq": self.head.seq, "digest": self.head.digest}
                write_atomically(self.witness_path, json.dumps(note).encode())

    def accept_witness(self) -> None:
        """Start a new witness at the present head, after a person decided that the ledger is the newest one."""
        self._write_witness(accept=True)


def create_store(path: Path, cohort_id: str, witness_path: Path | None) -> None:
    """Create an empty ledger. Refuses where the file, or a witness that there once was one, exists.

    Args:
        path: the new file.
        cohort_id: the site's permanent name for the people its data is about.
        witness_path: a second path, best on another disk.

    Raises:
        LedgerError: something is there already, or the disk refuses.
    """
    if not cohort_id:
        raise LedgerError("a ledger needs the permanent id of the site's cohort, found an empty one")
    with _as_ledger_errors(path):
        if path.exists() or (witness_path is not None and witness_path.exists()):
            raise LedgerError(
                f"there is, or was, a privacy ledger here already ({path}, witness {witness_path}): a "
                "second, empty one would forget what was spent; put the old one back"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        try:
            connection = sqlite3.connect(partial, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(_SCHEMA)
                first = _make_entry(
                    1, "genesis", "", "", {"cohort_id": cohort_id, "format": FORMAT}, _NO_PREVIOUS
                )
                connection.execute(f"INSERT INTO entries ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?)", _row(first))
            finally:
                connection.close()  # the last one out folds the write-ahead log into the file
            _place_new_file(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def open_store(
    path: Path,
    witness_path: Path | None,
    *,
    timeout_s: float = LOCK_TIMEOUT_S,
    read_only: bool = False,
    accept_witness: bool = False,
) -> EntryStore:
    """Open an existing ledger and check the whole chain.

    Args:
        path: the ledger's file.
        witness_path: where its head is also kept; None: a rollback is not noticed here.
        timeout_s: seconds to wait for another process' lock.
        read_only: for looking at it only; also works on a read-only copy.
        accept_witness: a missing or unfitting witness is replaced by the present head.

    Raises:
        LedgerError: missing, locked, unreadable, truncated, changed or rolled back.
    """
    if not path.is_file():
        raise LedgerError(
            f"no privacy ledger at {path}: expected the site's own file; make it once with `fedhypevae "
            "ledger create`"
            + (
                ""
                if witness_path is None or not witness_path.exists()
                else ", or put back the one that was there"
            )
        )
    with _as_ledger_errors(path):
        mode = "ro" if read_only else "rw"
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=timeout_s, isolation_level=None
        )
    try:
        with _as_ledger_errors(path):
            if not read_only:
                journal = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                if journal != "wal":
                    raise LedgerError(
                        f"privacy ledger {path} can't keep a write-ahead log here (found mode {journal}): "
                        "keep it on a local disk that can be written"
                    )
                connection.execute("PRAGMA synchronous=FULL")
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise LedgerError(f"privacy ledger {path} is damaged ({damage}): restore it from a backup")
        store = EntryStore(path, connection, None if accept_witness else witness_path)
        store.refresh()
        store.witness_path = witness_path
        return store
    except BaseException:
        connection.close()
        raise


def _checked_chain(path: Path, known: list[Entry], found: list[Entry]) -> list[Entry]:
    """`found`, if it continues `known`: places without gaps, each digest over its content and the one before."""
    previous = known[-1].digest if known else _NO_PREVIOUS
    for place, entry in enumerate(found, start=len(known) + 1):
        expected = _digest(
            (entry.seq, entry.at, entry.kind, entry.run_id, entry.round_key, entry.body_json, entry.previous)
        )
        if entry.seq != place or entry.previous != previous or entry.digest != expected:
            raise LedgerError(
                f"privacy ledger {path} was altered at entry {place}: an entry was changed or removed; "
                "restore it"
            )
        previous = entry.digest
    if not known and found and found[0].kind != "genesis":
        raise LedgerError(f"privacy ledger {path} does not begin with its cohort's entry; restore it")
    return found


def _read_witness(witness_path: Path | None) -> dict[str, Any] | None:
    """The witness' content, None where there is none. Raises ValueError where it is not a witness."""
    if witness_path is None:
        return None
    try:
        text = witness_path.read_text()
    except FileNotFoundError:
        return None
    note = json.loads(text)
    if not isinstance(note, dict) or set(note) != {"cohort_id", "seq", "digest"}:
        raise ValueError(f"{witness_path} is not a ledger's witness")
    return note


def _place_new_file(partial: Path, destination: Path) -> None:
    """Give a finished, synced file its name; fails with FileExistsError if somebody else was first."""
    sync_path(partial)
    os.link(partial, destination)
    sync_path(destination.parent)
