"""The charge of one round: reserved before the data is read, committed before the payload is sent.

Each function runs under the ledger's write lock, on a run as the store's entries tell it at that moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from client_app.ledger.declare import declare
from client_app.ledger.limits import BudgetLimits
from client_app.ledger.runs import Run, events_to_json, fits_plan, same_events
from client_app.ledger.store import EntryStore
from common.errors import BudgetExceeded, LedgerError, PolicyRefusal
from common.privacy.events import PrivacyEvent


@dataclass(frozen=True)
class Reservation:
    """The right to release one payload for one round. `payload_digest` is set if that was done already."""

    run_id: str
    round_key: str
    entry: int
    attempt: int
    payload_digest: str | None = None


def reserve_round(
    store: EntryStore,
    run: Run,
    round_key: str,
    events: Sequence[PrivacyEvent],
    *,
    limits: BudgetLimits,
    fingerprint: str,
) -> Reservation:
    """Charge one round of a declared run, or give a committed round's digest back. See `Ledger.reserve`.

    Raises:
        BudgetExceeded: nothing is left of the run's plan, or the limits no longer allow it; nothing charged.
        LedgerError: the disk refuses; nothing charged.
    """
    before = run.rounds.get(round_key)
    if before is not None and before.payload_digest is not None:
        return Reservation(run.run_id, round_key, before.reservation, before.attempts, before.payload_digest)
    check_open(run)
    _check_declared(run, round_key, events)
    fits = fits_plan((*run.charged, *events), run.planned)
    if not fits or run.limits != limits:
        plan = run.planned if fits else (*run.planned, *events)
        declare(store, run.run_id, plan, limits, fingerprint=fingerprint)
    body = {"events": events_to_json(events), "fingerprint": fingerprint}
    entry = store.append("reserve", run.run_id, round_key, body)
    return Reservation(run.run_id, round_key, entry.seq, 1 if before is None else before.attempts + 1)


def commit_round(store: EntryStore, run: Run | None, reservation: Reservation, payload_digest: str) -> None:
    """Note that a reserved round's payload is about to leave; again for the same payload changes nothing.

    Raises:
        LedgerError: another attempt at this round took over, or another payload was committed: send nothing.
    """
    known = None if run is None else run.rounds.get(reservation.round_key)
    if known is None or known.reservation != reservation.entry:
        raise LedgerError(
            f"round {reservation.round_key} of run {reservation.run_id} was taken over by a later "
            "attempt: this one must not be sent"
        )
    if known.payload_digest is None:
        body = {"reservation": reservation.entry, "payload_digest": payload_digest}
        store.append("commit", reservation.run_id, reservation.round_key, body)
    elif known.payload_digest != payload_digest:
        raise LedgerError(
            f"round {reservation.round_key} of run {reservation.run_id} was committed with another "
            "payload: only that one may be sent"
        )


def check_open(run: Run) -> None:
    """Refuse a closed run (BudgetExceeded)."""
    if run.closed:
        raise BudgetExceeded(f"run {run.run_id} was closed on {run.last_at}: a new run needs a new name")


def check_settings(run: Run | None, settings: str) -> None:
    """Hold a declared run's name to the settings that it first came with (PolicyRefusal)."""
    if run is not None and run.settings and run.settings != settings:
        raise PolicyRefusal(
            "run_name",
            f"run {run.run_id} was declared on {run.first_at} with other settings: a run with other settings needs "
            "another run-name; nothing was charged",
        )


def _check_declared(run: Run, round_key: str, events: Sequence[PrivacyEvent]) -> None:
    """Each round once must fit what was declared: only the same round may come again, as it was."""
    before = run.rounds.get(round_key)
    if before is not None and not same_events(events, before.events):
        raise BudgetExceeded(
            f"round {round_key} of run {run.run_id} was reserved with other events: repeat it with the same ones"
        )
    others = [event for name, known in run.rounds.items() if name != round_key for event in known.events]
    if not fits_plan([*others, *events], run.declared):
        raise BudgetExceeded(
            f"round {round_key} is more than run {run.run_id} declared on {run.first_at}: declare a new run for it"
        )
