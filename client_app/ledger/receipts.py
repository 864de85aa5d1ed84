"""Receipts that the server keeps and brings back: they show an old ledger that was put back.

With each release a site sends its ledger's head and a seal of it. The server returns both with its next request, in
later runs too, and the site looks for that head in its own ledger before anything is charged. A ledger that does not
hold it has forgotten what was spent.

The seal is a MAC under a key that never leaves the site, so that no server can make up a receipt and have the people
there believe that their ledger is old. Any entry of the chain will do: a server whose last reply was lost holds an
older one. A request without a receipt is answered: it is the first one, or another server's. So a server that works
with somebody who put the old ledger back hides it by bringing nothing, and the witness alone is left.

Where the key lies does not matter to the protection: without it, or with another, every receipt is refused as made up.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client_app.ledger.chain import Head
from client_app.ledger.ledger import Ledger
from client_app.place import Place
from client_app.release.log import LOG_FILE, Release, ReleaseLog
from client_app.task import Work
from common.durable import lock_file, make_private, write_atomically
from common.errors import LedgerError, ReceiptError

_KEY = "receipt.key"
_KEY_BYTES = 32


@contextmanager
def message_ledger(place: Place, work: Work) -> Iterator[Ledger]:
    """The site's ledger, opened for a message and held against the receipt that came with it; nothing is charged.

    Args:
        place: the site.
        work: the message's task; its words `receipt` and `seal`, where it has any, are what this site sent before.

    Raises:
        ReceiptError: this site never sealed such a receipt.
        LedgerError: the ledger does not hold the receipt's entry or the last release of the site's own log, or can't be
            used.
    """
    # read before the ledger: what another message's process logs in between, that ledger holds already
    last = ReleaseLog(place.folder / LOG_FILE).last_charged()
    with Ledger.open(
        place.policy.ledger_path(place.folder),
        place.policy.cohort_id,
        place.policy.witness_path(place.folder),
        create=place.new_ledger,
    ) as ledger:
        receipt, seal = str(work.words.get("receipt", "")), str(work.words.get("seal", ""))
        if receipt or seal:
            if not hmac.compare_digest(_seal(place, receipt).encode(), seal.encode()):
                raise ReceiptError(
                    f"the server brought a receipt that this site never gave for cohort {place.policy.cohort_id!r}: "
                    f"{receipt[:90]!r}; nothing was charged. Either the server made it up, or {key_path(place.folder)} "
                    "is not the key that it was. If the cohort's ledger was rightly begun again, `fedhypevae site "
                    "renew-key` here and `fedhypevae server rotate --forget` at the server let this site in without it"
                )
            ledger.check(Head.parse(receipt))
        _check_logged(last, ledger)
        yield ledger


def _check_logged(last: Release | None, ledger: Ledger) -> None:
    """Look in the ledger for the last release that the site's own log lists: it was committed before it was logged."""
    run = None if last is None else ledger.runs.get(last.run_id)
    known = None if run is None or last is None else run.rounds.get(last.round_key)
    if last is not None and (known is None or known.payload_digest != last.payload_digest):
        raise LedgerError(
            f"privacy ledger {ledger.path} is older than the site's own log: line {last.place} of releases.jsonl lists "
            f"a release of run {last.run_id}, {last.round_key}, that the ledger never committed: put the newest ledger "
            "back; nothing is released until then. Only with another cohort's ledger, move that log away"
        )


def receipt_words(place: Place, ledger: Ledger) -> dict[str, str]:
    """What a reply says of the ledger: its head, a salted digest, and the seal by which this site knows it again."""
    head = str(ledger.head)
    return {"receipt": head, "seal": _seal(place, head)}


def key_path(folder: Path) -> Path:
    """The key that seals a site's receipts."""
    return folder / "keys" / _KEY


def make_key(folder: Path) -> None:
    """Make the site's key, for its owner alone, where there is none.

    Raises:
        LedgerError: the disk refuses.
    """
    path = key_path(folder)
    try:
        make_private(path.parent)
        with lock_file(path.with_name(f"{_KEY}.lock")):
            if not path.exists():
                write_atomically(path, secrets.token_bytes(_KEY_BYTES), mode=0o600)
    except OSError as error:
        raise LedgerError(f"can't write {path} ({error}): free the disk; nothing is released") from error


def set_mark(place: Place, fingerprint: str) -> str:
    """A data set's fingerprint as the ledger notes it: under the site's key.

    A fingerprint is a digest of records, of imported embeddings without anything secret in it. Ledgers are exported and
    shown, and anybody who knows all records but one could try that record's values against it.

    Returns:
        The same text for the same set, hexadecimal.

    Raises:
        LedgerError: the key can't be read or made.
    """
    return _mac(place.folder, ["data set", place.policy.cohort_id, fingerprint])  # never as long as what is sealed


def _seal(place: Place, receipt: str) -> str:
    """MAC of a receipt of this cohort: anybody who lacks the key learns nothing from it."""
    return _mac(place.folder, [place.policy.cohort_id, receipt])


def _mac(folder: Path, words: list[str]) -> str:
    """HMAC-SHA256 under the site's key, hexadecimal."""
    path = key_path(folder)
    if not path.exists():
        make_key(folder)
    try:
        key = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"can't read {path} ({error}): nothing is released until it can be") from error
    if len(key) != _KEY_BYTES:
        raise LedgerError(f"{path} must hold {_KEY_BYTES} bytes, found {len(key)}: restore it; nothing is released")
    return hmac.new(key, json.dumps(words).encode(), hashlib.sha256).hexdigest()
