"""The ledger's entries added up, run by run: what each declared, was charged for, and released."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from client_app.ledger.chain import Entry
from client_app.ledger.limits import BudgetLimits
from common.errors import FedHypeVAEError, LedgerError
from common.privacy.events import PrivacyEvent, mechanism_counts


@dataclass(frozen=True)
class Round:
    """One round of a run: its last reservation and its events, the attempts, and the committed payload."""

    reservation: int
    events: tuple[PrivacyEvent, ...]
    attempts: int
    payload_digest: str | None = None


@dataclass(frozen=True)
class Run:
    """All that the ledger knows of one run.

    `declared` is what it asked for before its first round; `planned` also has the repeated rounds that were
    granted. `settings` is the digest of the settings that it came with; empty where none was noted.
    """

    run_id: str
    declared: tuple[PrivacyEvent, ...]
    planned: tuple[PrivacyEvent, ...]
    limits: BudgetLimits
    counts_whole: bool
    first_at: str
    last_at: str
    settings: str = ""
    charged: tuple[PrivacyEvent, ...] = ()
    closed: bool = False
    rounds: Mapping[str, Round] = field(default_factory=dict)

    @property
    def counted(self) -> tuple[PrivacyEvent, ...]:
        """The events that the lifetime budget must cover: all planned ones while the run may still go on."""
        return self.planned if self.counts_whole or not self.closed else self.charged


def events_to_json(events: Iterable[PrivacyEvent]) -> list[str]:
    """Events as the ledger stores them: the canonical text of each."""
    return [event.to_json() for event in events]


def fits_plan(charged: Iterable[PrivacyEvent], planned: Iterable[PrivacyEvent]) -> bool:
    """Whether what was charged is part of what was declared, counted per noise and sampling rate."""
    allowed = {(noise, rate): count for noise, rate, count in mechanism_counts(planned)}
    return all(count <= allowed.get((noise, rate), 0) for noise, rate, count in mechanism_counts(charged))


def same_events(some: Iterable[PrivacyEvent], others: Iterable[PrivacyEvent]) -> bool:
    """Whether two lists hold the same mechanisms equally often, whatever their labels."""
    return mechanism_counts(some) == mechanism_counts(others)


@dataclass
class _Tally:
    """A run while its entries are added up: `run` without what was charged, and that, which grows with each round."""

    run: Run
    charged: list[PrivacyEvent] = field(default_factory=list)
    rounds: dict[str, Round] = field(default_factory=dict)


class RunBook:
    """Adds up entries as they come, so that a long run does not start over at every round."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        """A book of some entries; raises as `follow`."""
        self._tallies: dict[str, _Tally] = {}
        self._read = 0
        self._last_digest = ""
        self.follow(entries)

    def follow(self, entries: Sequence[Entry]) -> None:
        """Take in the entries that were not taken in yet; starts over if the earlier ones are others.

        Raises:
            LedgerError: an entry can't follow from those before it (a commit without a reservation, say).
        """
        if len(entries) < self._read or (self._read > 0 and entries[self._read - 1].digest != self._last_digest):
            self._tallies, self._read = {}, 0
        for entry in entries[self._read :]:
            try:
                self._take(entry)
            except (KeyError, TypeError, ValueError, FedHypeVAEError) as error:
                raise LedgerError(f"ledger entry {entry.seq} ({entry.kind}) makes no sense: {error!r}") from error
            self._read, self._last_digest = self._read + 1, entry.digest

    def run(self, run_id: str) -> Run | None:
        """One run, None if it was never declared."""
        tally = self._tallies.get(run_id)
        if tally is None:
            return None
        return replace(tally.run, charged=tuple(tally.charged), rounds=dict(tally.rounds))

    def runs(self) -> dict[str, Run]:
        """All runs in the order of their declaration."""
        found = ((run_id, self.run(run_id)) for run_id in self._tallies)
        return {run_id: run for run_id, run in found if run is not None}

    def _take(self, entry: Entry) -> None:
        body = entry.body
        if entry.kind in {"genesis", "moved", "arrived"}:
            return
        if entry.kind == "declare":
            self._take_declaration(entry)
            return
        tally = self._tallies[entry.run_id]  # KeyError: a run that was never declared
        if entry.kind == "reserve":
            events = _events(body["events"])
            before = tally.rounds.get(entry.round_key)
            attempts = 1 if before is None else before.attempts + 1
            tally.rounds[entry.round_key] = Round(entry.seq, events, attempts)
            tally.charged.extend(events)
        elif entry.kind == "commit":
            before = tally.rounds[entry.round_key]
            if before.reservation != int(body["reservation"]):
                raise ValueError("a commit without its reservation")
            tally.rounds[entry.round_key] = replace(before, payload_digest=str(body["payload_digest"]))
        elif entry.kind != "close":
            raise ValueError("an unknown kind of entry")
        tally.run = replace(tally.run, last_at=entry.at, closed=tally.run.closed or entry.kind == "close")

    def _take_declaration(self, entry: Entry) -> None:
        body = entry.body
        planned, limits = _events(body["planned"]), BudgetLimits(**body["limits"])
        whole = bool(body["counts_whole"])
        tally = self._tallies.get(entry.run_id)
        if tally is None:
            settings = str(body.get("settings", ""))  # older ledgers noted none
            run = Run(entry.run_id, planned, planned, limits, whole, entry.at, entry.at, settings)
            self._tallies[entry.run_id] = _Tally(run)
            return
        whole = whole or tally.run.counts_whole
        tally.run = replace(tally.run, planned=planned, limits=limits, last_at=entry.at, counts_whole=whole)


def fold_entries(entries: Sequence[Entry]) -> dict[str, Run]:
    """All runs of a ledger's entries. Raises LedgerError if they make no sense."""
    return RunBook(entries).runs()


def _events(texts: Iterable[str]) -> tuple[PrivacyEvent, ...]:
    return tuple(PrivacyEvent.from_json(text) for text in texts)
