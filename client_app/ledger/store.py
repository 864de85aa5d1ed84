"""The file under the privacy ledger: an append-only, hash-chained table in SQLite.

What the entries mean is the business of `client_app.ledger.ledger`; here they are only kept: never changed
(triggers), never changed unseen (the chain), never rolled back unseen (the witness), and on the disk before
anybody goes on (`synchronous=FULL`). Whatever goes wrong, SQLite's own errors included, comes out as a
`LedgerError`.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from client_app.ledger.chain import (
    COLUMNS,
    NO_PREVIOUS,
    Entry,
    Head,
    Witness,
    check_chain,
    check_receipt,
    lock_witness,
    make_entry,
    put_witness,
    read_witness,
    write_witness,
)
from client_app.ledger.files import as_ledger_errors, new_file
from common.durable import make_private
from common.errors import LedgerError

FORMAT = 1
LOCK_TIMEOUT_S = 20.0
_BEFORE_ALL = -(2**62)  # so that an entry put before the first one is seen, too

_SCHEMA = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL,
    run_id TEXT NOT NULL, round_key TEXT NOT NULL, body TEXT NOT NULL,
    previous TEXT NOT NULL, digest TEXT NOT NULL UNIQUE
) STRICT;
CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;
CREATE UNIQUE INDEX one_commit_per_round ON entries (run_id, round_key) WHERE kind = 'commit';
"""
_COLUMNS = ", ".join(COLUMNS)
_INSERT = f"INSERT INTO entries ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


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
        """Read what others appended; check that it continues the chain and that the witness is part of it."""
        with as_ledger_errors(self.path):
            # The witness is read first: it may only lag behind the file, so its head must be found there.
            witness = None if self.witness_path is None else read_witness(self.witness_path)
            start = len(self._entries)
            rows = self._connection.execute(
                f"SELECT {_COLUMNS} FROM entries WHERE seq >= ? ORDER BY seq",
                (start if start > 0 else _BEFORE_ALL,),
            ).fetchall()
            found = [Entry(*row) for row in rows]
            if start > 0:
                if not found or found[0] != self._entries[-1]:
                    raise LedgerError(f"privacy ledger {self.path} was changed or rolled back while it was open")
                found = found[1:]
            check_chain(self.path, self._entries, found)
            self._entries.extend(found)
            if not self._entries:
                raise LedgerError(f"{self.path} holds no ledger: it was emptied or truncated; restore it")
            if witness is None and self.witness_path is not None and self.witness_path.exists():
                self.refresh()  # another process has written the first one since it was looked for
                return
            self._check_witness(witness)

    def reread(self) -> None:
        """Forget what was read and check the whole chain from the first entry again."""
        self._entries.clear()
        self.refresh()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock; what is appended inside reaches the disk as one whole, or not at all."""
        with as_ledger_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
        kept = len(self._entries)
        try:
            self.refresh()
            kept = len(self._entries)
            if self.witness_path is not None and not self.witness_path.exists():
                self.note_head()  # of the first entry: nobody may find a second one, and no witness
            yield
            with as_ledger_errors(self.path):
                self._connection.execute("COMMIT")
        except BaseException:
            del self._entries[kept:]
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self.note_head()

    def append(self, kind: str, run_id: str, round_key: str, body: Mapping[str, Any]) -> Entry:
        """Append one entry; only inside `writing`. `body` holds finite JSON values.

        Each entry holds 128 secret bits. Digests leave the site as receipts; without the salt, anybody who knows all
        records but one could try that record's values against the digest, which covers the data's fingerprint.
        """
        if not self._connection.in_transaction:
            raise LedgerError("an entry can only be appended inside `writing`")
        with as_ledger_errors(self.path):
            salted = {**body, "salt": secrets.token_hex(16)}
            entry = make_entry(self.head.seq + 1, kind, run_id, round_key, salted, self.head.digest)
            self._connection.execute(_INSERT, entry.row)
        self._entries.append(entry)
        return entry

    def copy_to(self, destination: Path, finish: Callable[[Path], None] | None = None) -> None:
        """Write a whole copy, without a write-ahead log beside it; `finish` works on it before it appears."""
        with as_ledger_errors(destination), new_file(destination) as partial:
            copy = sqlite3.connect(partial)
            try:
                self._connection.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")
            finally:
                copy.close()
            if finish is not None:
                finish(partial)

    def note_head(self, *, replace: bool = False) -> None:
        """Write the head to the witness. `replace`: a person decided that this ledger is the newest one."""
        if self.witness_path is None:
            return
        with as_ledger_errors(self.witness_path):
            witness = Witness(self.cohort_id, self.head)
            write_witness(self.witness_path, witness, timeout_s=LOCK_TIMEOUT_S, replace=replace)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _check_witness(self, witness: Witness | None) -> None:
        if self.witness_path is None:
            return
        if witness is None:
            # only a ledger that was made without one, and never used, may get its first witness by itself
            if len(self._entries) > 1 or self._entries[0].body.get("witnessed", False):
                raise LedgerError(
                    f"the ledger's witness {self.witness_path} is missing, so a rolled-back ledger could not "
                    "be noticed: put it back, or accept the ledger as it stands with `fedhypevae ledger witness`"
                )
            return
        if witness.cohort_id != self.cohort_id:
            raise LedgerError(
                f"witness {self.witness_path} belongs to cohort {witness.cohort_id!r}, ledger {self.path} to "
                f"{self.cohort_id!r}: point the site at the pair that belongs together"
            )
        last = self._entries[-1]
        if last.kind == "moved" and witness.head.seq > last.seq:
            raise LedgerError(
                f"privacy ledger {self.path} was moved to {last.body['destination']} on {last.at}: use that one"
            )
        check_receipt(self.path, self._entries, witness.head)


def create_store(path: Path, cohort_id: str, witness_path: Path | None) -> None:
    """Create an empty ledger and its witness. Refuses where the file, or a witness that there once was one, exists.

    The witness is written before the ledger has its name, and the first entry says that there is one: such a ledger is
    never taken without it. What a kill between the two leaves is a witness of a ledger that was never used, which may
    be made again.

    Args:
        path: the new file.
        cohort_id: the site's permanent name for the people its data is about.
        witness_path: a second path, best on another disk.

    Raises:
        LedgerError: something is there already, or the disk refuses.
    """
    if not cohort_id:
        raise LedgerError("a ledger needs the permanent id of the site's cohort, found an empty one")
    with as_ledger_errors(path), ExitStack() as stack:
        known = None
        if witness_path is not None:
            stack.enter_context(lock_witness(witness_path, timeout_s=LOCK_TIMEOUT_S))
            known = read_witness(witness_path)
        unused = known is None or (known.head.seq == 1 and known.cohort_id == cohort_id)
        if path.exists() or not unused:
            raise LedgerError(
                f"there is, or was, a privacy ledger here already ({path}, witness {witness_path}): a "
                "second, empty one would forget what was spent; put the old one back"
            )
        make_private(path.parent)
        with new_file(path) as partial:
            body = {"cohort_id": cohort_id, "format": FORMAT, "witnessed": witness_path is not None}
            first = make_entry(1, "genesis", "", "", body, NO_PREVIOUS)
            connection = sqlite3.connect(partial, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(_SCHEMA)
                connection.execute(_INSERT, first.row)
            finally:
                connection.close()  # the last one out folds the write-ahead log into the file
            if witness_path is not None:
                put_witness(witness_path, Witness(cohort_id, Head(1, first.digest)))


def open_store(
    path: Path,
    witness_path: Path | None,
    *,
    timeout_s: float = LOCK_TIMEOUT_S,
    read_only: bool = False,
) -> EntryStore:
    """Open an existing ledger and check the whole chain.

    Args:
        path: the ledger's file.
        witness_path: where its head is also kept; None: a rollback is not noticed here.
        timeout_s: seconds to wait for another process' lock.
        read_only: for looking at it only; also works on a read-only copy.

    Raises:
        LedgerError: missing, locked, unreadable, truncated, changed or rolled back.
    """
    if not path.is_file():
        raise LedgerError(
            f"no privacy ledger at {path}: put back the site's own file; at enrolment, and only then, make "
            "one with `fedhypevae ledger create`"
        )
    with as_ledger_errors(path):
        uri = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rw'}"
        connection = sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None)
    try:
        with as_ledger_errors(path):
            if not read_only:
                _make_durable(path, connection)
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if damage != "ok":
                raise LedgerError(f"privacy ledger {path} is damaged ({damage}): restore it from a backup")
        store = EntryStore(path, connection, witness_path)
        store.refresh()
        return store
    except BaseException:
        connection.close()
        raise


def check_not_moved(store: EntryStore) -> None:
    """Refuse the file that a moved ledger left behind. Raises LedgerError that says where it went."""
    last = store.entries[-1]
    if last.kind == "moved":
        raise LedgerError(
            f"privacy ledger {store.path} was moved to {last.body['destination']} on {last.at}: use that "
            "one, or complete a move that broke off with `fedhypevae ledger move`"
        )


def _make_durable(path: Path, connection: sqlite3.Connection) -> None:
    journal = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if journal != "wal":
        raise LedgerError(
            f"privacy ledger {path} can't keep a write-ahead log here (found mode {journal}): keep it on a "
            "local disk that can be written"
        )
    connection.execute("PRAGMA synchronous=FULL")
