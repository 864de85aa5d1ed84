"""Writing a run's plan into the ledger: the one expensive check, made once a run and not in each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from client_app.ledger.budget import assess_plan
from client_app.ledger.limits import BudgetLimits
from client_app.ledger.runs import Run, events_to_json, fold_entries, same_events
from client_app.ledger.store import EntryStore
from common.errors import BudgetExceeded
from common.privacy.events import PrivacyEvent


class TrialOver(Exception):
    """A plan fits, and was only tried."""


def declare(
    store: EntryStore,
    run_id: str,
    planned: Sequence[PrivacyEvent],
    limits: BudgetLimits,
    *,
    fingerprint: str,
    settings: str = "",
    close_idle_after: timedelta | None = None,
    trial: bool = False,
) -> None:
    """Assess a run's plan and append it; the caller holds the write lock.

    Args:
        store: the ledger, inside `writing`.
        run_id: the run; if it was declared before, its plan is replaced. A plan that changes after a first release
            was chosen knowing that release: the first-run rule is not for it.
        planned: every event it may ever be charged for.
        limits: what the site allows.
        fingerprint: digest of the data set; only recorded.
        settings: digest of the run's settings; those of its first declaration stand.
        trial: only look whether it fits.
        close_idle_after: how long a run must have been silent to be closed where the plan does not fit.

    Raises:
        BudgetExceeded: the plan does not fit. TrialOver: it does, and this was a trial. What was appended is rolled
            back with the caller's transaction.
    """
    runs = fold_entries(store.entries)
    before = runs.get(run_id)
    chosen_late = before is not None and bool(before.rounds) and not same_events(planned, before.planned)
    try:
        assessment = assess_plan(runs, run_id, planned, limits, chosen_late=chosen_late)
    except BudgetExceeded:
        if close_idle_after is None or not _close_idle(store, runs, run_id, close_idle_after):
            raise
        runs = fold_entries(store.entries)
        assessment = assess_plan(runs, run_id, planned, limits, chosen_late=chosen_late)
    if trial:
        raise TrialOver
    body = {
        "planned": events_to_json(planned),
        "limits": asdict(limits),
        "fingerprint": fingerprint,
        "settings": settings,
        **asdict(assessment),
    }
    store.append("declare", run_id, "", body)


def _close_idle(store: EntryStore, runs: Mapping[str, Run], run_id: str, idle_after: timedelta) -> bool:
    """Close other open runs that were silent for long; says whether there was any."""
    oldest = datetime.now(UTC) - idle_after
    idle = [
        run
        for run in runs.values()
        if run.run_id != run_id and not run.closed and datetime.fromisoformat(run.last_at) < oldest
    ]
    for run in idle:
        store.append("close", run.run_id, "", {"reason": f"idle since {run.last_at}"})
    return bool(idle)
