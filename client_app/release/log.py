"""What left the site, for the site's own people: an append-only log, a line of JSON for each release.

Each line holds the SHA-256 of itself and of the line before, so a changed, removed or exchanged line is
found. A release is logged when it was committed to the ledger and before it is sent: a line says "may have
left". Payloads are not kept here, only their digest and size.

The ledger holds each commit as well, and the log is no view of it, for three reasons. It shows an old ledger that was
put back, without a witness and without a server (`receipts._check_logged`). It lists what the ledger never hears of:
what leaves from public data, without charge. And it is text, which people read without a program.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from client_app.ledger.chain import NO_PREVIOUS, chained
from common.durable import lock_file, sync_path
from common.errors import LedgerError

LOCK_TIMEOUT_S = 20.0
LOG_FILE = "releases.jsonl"


@dataclass(frozen=True)
class Release:
    """One release: when, of which run and round, what it was, and the digest and size of the bytes."""

    place: int
    at: str
    run_id: str
    round_key: str
    events: tuple[str, ...]
    payload_digest: str
    payload_bytes: int
    previous: str
    digest: str


class ReleaseLog:
    """The log at one path. Every call checks the file again; any number of processes may append."""

    def __init__(self, path: Path, *, timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Take the log's file, made at the first release, and how many seconds to wait for its lock."""
        self.path = path
        self._timeout_s = timeout_s

    def append(
        self, run_id: str, round_key: str, events: Sequence[str], payload_digest: str, payload_bytes: int
    ) -> Release:
        """Log one release; on the disk when this returns.

        A payload that is sent again (same run, round and digest) is already in the log and gets no second
        line.

        Args:
            run_id: the run.
            round_key: the round within it.
            events: what was charged for it: the canonical text of each privacy event; empty for public data.
            payload_digest: SHA-256 of the payload, hexadecimal.
            payload_bytes: its size in bytes.

        Returns:
            The logged line.

        Raises:
            LedgerError: the log can't be locked, verified or written: send nothing.
        """
        payload = (run_id, round_key, payload_digest)
        try:
            with lock_file(self.path.with_name(f"{self.path.name}.lock"), timeout_s=self._timeout_s):
                releases, length = self._read()
                for release in reversed(releases):
                    if (release.run_id, release.round_key, release.payload_digest) == payload:
                        return release
                place, at = len(releases) + 1, datetime.now(UTC).isoformat(timespec="milliseconds")
                previous = releases[-1].digest if releases else NO_PREVIOUS
                content = (place, at, run_id, round_key, tuple(events), payload_digest, payload_bytes, previous)
                release = Release(*content, chained(content))
                self._write(release, length)
                return release
        except (OSError, ValueError, TypeError) as error:
            raise LedgerError(
                f"release log {self.path} can't be written ({error}): free the disk or the lock; nothing is sent"
            ) from error

    def read(self) -> tuple[Release, ...]:
        """All releases, first to last, with the chain checked. Raises LedgerError if it is broken."""
        return self._read()[0]

    def last_charged(self) -> Release | None:
        """The last release that was charged; None if there is none. Only the lines from there on are read.

        Raises:
            LedgerError: the log can't be read, or such a line was altered.
        """
        lines = self._content().splitlines()
        for place in range(len(lines), 0, -1):
            release = _parse(lines[place - 1])
            if release is None or release.place != place:
                raise self._altered(place)
            if release.events:
                return release
        return None

    def verify(self, committed: frozenset[str] | None = None) -> int:
        """Check the chain and, if given, that whatever left had been committed to the ledger.

        Args:
            committed: payload digests of the ledger's commits.

        Returns:
            The number of releases.

        Raises:
            LedgerError: names the first line that does not fit.
        """
        releases = self.read()
        for release in releases:
            if committed is not None and release.payload_digest not in committed:
                raise LedgerError(
                    f"release log {self.path}, line {release.place}: a payload left that the ledger never committed"
                )
        return len(releases)

    def _read(self) -> tuple[tuple[Release, ...], int]:
        """The whole lines and their length in bytes."""
        content = self._content()
        releases: list[Release] = []
        previous = NO_PREVIOUS
        for place, line in enumerate(content.splitlines(), start=1):
            release = _parse(line)
            if release is None or release.place != place or release.previous != previous:
                raise self._altered(place)
            releases.append(release)
            previous = release.digest
        return tuple(releases), len(content)

    def _content(self) -> bytes:
        """The whole lines: a kill while writing leaves at most part of one more."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise LedgerError(f"release log {self.path} can't be read ({error}); nothing is sent") from error
        return content[: content.rfind(b"\n") + 1]

    def _altered(self, place: int) -> LedgerError:
        line = f"release log {self.path} was altered at line {place}: a line was changed, removed or exchanged"
        return LedgerError(line)

    def _write(self, release: Release, length: int) -> None:
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, length)  # a part of a line, left by a kill before anything was sent
            line = json.dumps(asdict(release), separators=(",", ":")).encode() + b"\n"
            if os.pwrite(descriptor, line, length) != len(line):
                raise OSError("the disk is full")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            sync_path(self.path.parent)


def _parse(line: bytes) -> Release | None:
    """A line that is what its digest says; else None."""
    try:
        values = json.loads(line)
        release = Release(**{**values, "events": tuple(values["events"])})
    except (ValueError, TypeError, KeyError):
        return None
    fields = list(asdict(release).values())
    return release if release.digest == chained(fields[:-1]) else None
