"""The site's privacy ledger: what was ever released about its patients, charged before the data is read.

One ledger per cohort, for its whole life: over runs, processes and restarts, whatever the data set becomes. A
data set that grew, or lost a patient who withdrew, keeps its ledger; the data's fingerprint is only written
down.

A run goes: `declare_run` (once: checks the whole plan, the expensive part), then for each round `reserve`
(charged, on the disk, before the data is read), the computation, the payload onto the disk, `commit` (with
the payload's digest), and only then is the payload sent. Killed anywhere in between, the reservation stays
charged.

A round that comes again:
- committed: `reserve` charges nothing and gives the digest back. Only those very bytes may be sent again; a
  second computation would be a second release.
- reserved only: it is charged again, and the earlier attempt (an orphan process may still be at it) can't
  commit any more. Within the declared plan that needs no new check, so the last rounds of the plan may be
  refused instead; where the site's limits leave room, the plan is extended.

A run that stops early is charged for its reserved rounds only, once it is closed.
A patient who withdraws is left out of the data from the next round on; what was spent before stays spent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from client_app.ledger.chain import Entry, Head, check_receipt
from client_app.ledger.charge import Reservation, check_open, check_settings, commit_round, reserve_round
from client_app.ledger.declare import TrialOver, declare
from client_app.ledger.limits import BudgetLimits
from client_app.ledger.runs import Run, RunBook, same_events
from client_app.ledger.store import LOCK_TIMEOUT_S, EntryStore, check_not_moved, create_store, open_store
from common.errors import LedgerError
from common.privacy.composition import epsilon_pld
from common.privacy.events import PrivacyEvent


class Ledger(AbstractContextManager["Ledger"]):
    """An open ledger; use it as a context manager. One thread at a time; any number of processes."""

    def __init__(self, store: EntryStore) -> None:
        """Not for use outside: call `Ledger.open` or `Ledger.create`. What looks after the file takes `store`."""
        self.store = store
        self._book = RunBook(store.entries)

    @classmethod
    def create(cls, path: Path, cohort_id: str, witness_path: Path | None = None) -> Ledger:
        """Make the site's ledger, once, at enrolment.

        Args:
            path: the new file, on a local disk.
            cohort_id: permanent name of the group of people the site's data is about.
            witness_path: a second path, best on another disk, that keeps the head's digest.

        Raises:
            LedgerError: a ledger or its witness is there already, or the disk refuses.
        """
        create_store(path, cohort_id, witness_path)
        return cls.open(path, cohort_id, witness_path)

    @classmethod
    def open(
        cls,
        path: Path,
        cohort_id: str | None,
        witness_path: Path | None = None,
        *,
        create: bool = False,
        read_only: bool = False,
        allow_moved: bool = False,
        timeout_s: float = LOCK_TIMEOUT_S,
    ) -> Ledger:
        """Open the ledger and check its whole chain, also against the witness.

        Args:
            path: the ledger's file.
            cohort_id: the cohort it must belong to; None: any (for looking at it).
            witness_path: where its head is also kept.
            create: make it if neither it nor its witness exists (simulations, demos). A deployed site leaves this
                off: there, a missing ledger is a lost one.
            read_only: for looking at it only.
            allow_moved: open what a moved ledger left behind, to look at it or to complete a move.
            timeout_s: seconds to wait for another process.

        Raises:
            LedgerError: missing, locked, unreadable, truncated, changed, rolled back, moved, or another cohort's.
        """
        if create and cohort_id is not None and not path.exists():
            try:
                create_store(path, cohort_id, witness_path)
            except LedgerError:
                if not path.exists():  # else: another process was first, which is as good
                    raise
        store = open_store(path, witness_path, timeout_s=timeout_s, read_only=read_only)
        try:
            if cohort_id is not None and store.cohort_id != cohort_id:
                raise LedgerError(
                    f"privacy ledger {path} belongs to cohort {store.cohort_id!r}, expected {cohort_id!r}: "
                    "point the site at the ledger of its own cohort"
                )
            if not allow_moved:
                check_not_moved(store)
            return cls(store)
        except BaseException:
            store.close()
            raise

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    @property
    def path(self) -> Path:
        """The ledger's file."""
        return self.store.path

    @property
    def cohort_id(self) -> str:
        """The cohort whose budget this is."""
        return self.store.cohort_id

    @property
    def head(self) -> Head:
        """The receipt of the present state."""
        return self.store.head

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries as of the last read or write, first to last."""
        return self.store.entries

    @property
    def runs(self) -> dict[str, Run]:
        """All runs, as of the last read or write, in the order of their declaration."""
        self._book.follow(self.store.entries)
        return self._book.runs()

    def declare_run(
        self,
        run_id: str,
        planned: Sequence[PrivacyEvent],
        limits: BudgetLimits,
        *,
        fingerprint: str,
        settings: str = "",
        close_idle_after: timedelta | None = None,
        trial: bool = False,
    ) -> Head:
        """Ask, before a run's first round, for all that it may ever be charged. Charges nothing itself.

        Asking again with the same plan and limits changes nothing, so each message's process may ask.

        Args:
            run_id: the run's lasting name: the same one when the run resumes after a crash.
            planned: every event of the whole run, statistics included.
            limits: what the site's policy allows.
            fingerprint: digest of the data set as it is now; only recorded.
            settings: digest of the run's settings, to which its name is held from then on; empty: not held.
            close_idle_after: where the plan does not fit, runs silent for so long are closed, and it is tried again.
            trial: only ask; what would be written is taken back.

        Returns:
            The ledger's head.

        Raises:
            BudgetExceeded: the plan does not fit into the run's or the lifetime's budget, or the run is closed.
            LedgerError: the ledger can't be used, or the run was declared with another plan.
            PolicyRefusal: the run was declared with other settings.
        """
        if not run_id or not planned:
            raise LedgerError("a run is declared with a name and at least one event")
        run = self._run(run_id)
        check_settings(run, settings)
        if run is not None and run.limits == limits and not run.closed and same_events(planned, run.declared):
            return self.head
        epsilon_pld(planned, limits.lifetime_delta)  # seconds, remembered: not while others wait for the lock
        with suppress(TrialOver), self._writing():
            run = self._run(run_id)
            if run is not None:
                check_open(run)
                check_settings(run, settings)
                if not same_events(planned, run.declared):
                    raise LedgerError(
                        f"run {run_id} was declared with other events than it asks for now: a changed run "
                        "needs a new name"
                    )
            declare(
                self.store,
                run_id,
                planned if run is None else run.planned,
                limits,
                fingerprint=fingerprint,
                settings=settings,
                close_idle_after=close_idle_after,
                trial=trial,
            )
        return self.head

    def reserve(
        self,
        run_id: str,
        round_key: str,
        events: Sequence[PrivacyEvent],
        *,
        limits: BudgetLimits,
        fingerprint: str,
    ) -> Reservation:
        """Charge one round, before its data is read.

        Args:
            run_id: a declared run.
            round_key: names the round within the run (`statistics`, `round-7`).
            events: what this round releases.
            limits: what the site's policy allows now; a policy made stricter since the declaration applies.
            fingerprint: digest of the data set as it is now; only recorded.

        Returns:
            A reservation to commit; or, if the round was committed, its `payload_digest` (nothing is charged).

        Raises:
            BudgetExceeded: nothing is left of the run's plan, or the limits no longer allow it; nothing charged.
            LedgerError: the ledger can't be used, or the run was not declared; nothing charged.
        """
        if not round_key or not events:
            raise LedgerError("a reservation names its round and holds at least one event")
        with self._writing():
            run = self._run(run_id)
            if run is None:
                raise LedgerError(f"run {run_id} was not declared to the ledger: call declare_run before its rounds")
            return reserve_round(self.store, run, round_key, events, limits=limits, fingerprint=fingerprint)

    def commit(self, reservation: Reservation, payload_digest: str) -> Head:
        """Note that a payload is about to leave: when it is on the disk, before it is sent.

        Args:
            reservation: what `reserve` gave.
            payload_digest: SHA-256 of the payload's bytes, hexadecimal.

        Returns:
            The ledger's head, sent along as a receipt.

        Raises:
            LedgerError: the ledger can't be used, or another attempt at this round took over: send nothing.
        """
        if len(payload_digest) != 64:
            raise LedgerError("a payload's digest has 64 hexadecimal digits")
        with self._writing():
            commit_round(self.store, self._run(reservation.run_id), reservation, payload_digest)
        return self.head

    def close_run(self, run_id: str, reason: str) -> Head:
        """End a run for good: what it did not use of its plan is free again.

        Raises:
            LedgerError: no such run.
        """
        with self._writing():
            run = self._run(run_id)
            if run is None:
                raise LedgerError(f"no run {run_id} in ledger {self.path}")
            if not run.closed:
                self.store.append("close", run_id, "", {"reason": reason})
        return self.head

    def check(self, receipt: Head) -> None:
        """Look for a head that was noted elsewhere. Raises LedgerError if the entries read last do not hold it."""
        check_receipt(self.path, self.store.entries, receipt)

    def verify(self, receipt: Head | None = None) -> Head:
        """Check the whole chain again, the sense of every entry, the witness, and a receipt.

        Returns:
            The head, to be kept elsewhere as the next receipt.

        Raises:
            LedgerError: says which entry was changed, or that the file was rolled back.
        """
        self.store.reread()
        self._book = RunBook(self.store.entries)
        if receipt is not None:
            self.check(receipt)
        return self.head

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone with the newest entries; refused where the ledger was moved."""
        with self.store.writing():
            check_not_moved(self.store)
            yield

    def _run(self, run_id: str) -> Run | None:
        self._book.follow(self.store.entries)
        return self._book.run(run_id)
