"""Entries of the privacy ledger, the hash chain through them, and the witness of its head elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.durable import lock_file, make_private, write_atomically
from common.errors import LedgerError

NO_PREVIOUS = "0" * 64
COLUMNS = ("seq", "at", "kind", "run_id", "round_key", "body", "previous", "digest")


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

    @property
    def row(self) -> tuple[int | str, ...]:
        """The fields, in the order of `COLUMNS`."""
        return astuple(self)


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
        if not (seq.isascii() and seq.isdigit()) or len(digest) != 64:
            raise LedgerError(f"a receipt has the form NUMBER:64-HEX-DIGITS, found {text!r}")
        return Head(int(seq), digest)


def make_entry(seq: int, kind: str, run_id: str, round_key: str, body: Mapping[str, Any], previous: str) -> Entry:
    """An entry of this moment, with its digest. Raises ValueError or TypeError if `body` is not JSON."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    content = (seq, at, kind, run_id, round_key, canonical(body), previous)
    return Entry(*content, chained(content))


def canonical(body: Mapping[str, Any]) -> str:
    """An entry's content as the text that its digest is over."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def chained(fields: Sequence[object]) -> str:
    """SHA-256, in a chain, over the canonical form (a JSON array without spaces) of all fields but the digest."""
    return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()


def check_chain(path: Path, known: Sequence[Entry], found: Sequence[Entry]) -> None:
    """Check that `found` continues `known`: no gaps, each digest over its content and the digest before it.

    Raises:
        LedgerError: names the first entry that does not fit.
    """
    previous = known[-1].digest if known else NO_PREVIOUS
    for place, entry in enumerate(found, start=len(known) + 1):
        if entry.seq != place or entry.previous != previous or entry.digest != chained(entry.row[:-1]):
            raise LedgerError(
                f"privacy ledger {path} was altered at entry {place}: an entry was changed or removed; restore it"
            )
        previous = entry.digest
    if not known and found and found[0].kind != "genesis":
        raise LedgerError(f"privacy ledger {path} does not begin with its cohort's entry; restore it")


def check_receipt(path: Path, entries: Sequence[Entry], receipt: Head) -> None:
    """Hold the entries against a head that was noted earlier, elsewhere: it may be any of them, not only the last.

    Raises:
        LedgerError: the ledger ends before it (rolled back), or has another entry in its place (rewritten).
    """
    cure = "put the newest copy back, since an older one forgets what was spent; nothing is released until then"
    if receipt.seq > len(entries):
        raise LedgerError(
            f"privacy ledger {path} was rolled back: it ends at entry {len(entries)}, but entry "
            f"{receipt.seq} was noted elsewhere: {cure}"
        )
    if receipt.seq < 1 or entries[receipt.seq - 1].digest != receipt.digest:
        raise LedgerError(
            f"privacy ledger {path} was rewritten: entry {receipt.seq} is not the one that was noted elsewhere: {cure}"
        )


@dataclass(frozen=True)
class Witness:
    """What the second path says: whose ledger it is, and its head when it was last written."""

    cohort_id: str
    head: Head


def read_witness(path: Path) -> Witness | None:
    """The witness at a path, None where there is no file. Raises ValueError if the file is something else."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    note = json.loads(text)
    if not isinstance(note, dict) or set(note) != {"cohort_id", "seq", "digest"}:
        raise ValueError(f"{path} is not a ledger's witness")
    return Witness(str(note["cohort_id"]), Head(int(note["seq"]), str(note["digest"])))


def write_witness(path: Path, witness: Witness, *, timeout_s: float, replace: bool = False) -> None:
    """Note the head at the second path. It never goes back, unless a person asks to `replace` it.

    Raises:
        OSError: the disk refuses, or another process holds the lock for longer than `timeout_s`.
    """
    with lock_witness(path, timeout_s=timeout_s):
        known = None if replace else read_witness(path)
        if known is None or known.head.seq < witness.head.seq:
            put_witness(path, witness)


@contextmanager
def lock_witness(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Keep other processes from writing the witness; its folder is made, for its owner alone, if it is missing."""
    make_private(path.parent)
    with lock_file(path.with_name(f"{path.name}.lock"), timeout_s=timeout_s):
        yield


def put_witness(path: Path, witness: Witness) -> None:
    """Replace the file, whatever it says; the caller holds its lock."""
    note = {"cohort_id": witness.cohort_id, "seq": witness.head.seq, "digest": witness.head.digest}
    write_atomically(path, json.dumps(note).encode(), mode=0o600)
