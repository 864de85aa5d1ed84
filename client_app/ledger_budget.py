"""What the ledger's entries add up to, and whether one more run fits into the budget.

Pure functions over entries: nothing here reads or writes a file. The rules:

- Within a run, whose events are declared before its first round, privacy loss distributions compose the whole
  plan.
- Across runs, each chosen after the results of those before were seen, an RDP filter composes (adaptive
  composition). A run that is still open counts with all it declared, so that two runs at once can't overspend
  together; a closed one with what it was charged for.
- The very first run may be admitted on its PLD bound alone, which is tighter; such a run counts whole for
  ever, since mixing the two bounds after an early stop has no proof.

Neighbouring relation: add or remove one unit (`BudgetLimits.unit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from client_app.ledger_chain import Entry
from common.composition import epsilon_pld
from common.errors import BudgetExceeded, FedHypeVAEError, LedgerError
from common.events import PrivacyEvent, mechanism_counts
from common.privacy_filter import filter_allows, filter_epsilon_spent, filter_share_spent


@dataclass(frozen=True)
class BudgetLimits:
    """What a site allows: lifetime ε and δ, ε of one run (at the same δ), and whom they protect."""

    lifetime_epsilon: float
    lifetime_delta: float
    run_epsilon: float
    unit: str = "record"

    def __post_init__(self) -> None:
        """Refuse limits that would switch the protection off."""
        sane = (
            0.0 < self.lifetime_epsilon < math.inf
            and 0.0 < self.run_epsilon < math.inf
            and 0.0 < self.lifetime_delta < 1.0
            and self.unit in {"record", "patient"}
        )
        if not sane:
            raise LedgerError(
                f"budget limits need finite epsilons, 0 < delta < 1 and unit record or patient, found {self}"
            )


@dataclass(frozen=True)
class Round:
    """One round of a run: the place of its last reservation, how many there were, its committed payload."""

    reservation: int
    attempts: int
    payload_digest: str | None = None


@dataclass(frozen=True)
class Run:
    """All that the ledger knows of one run."""

    run_id: str
    planned: tuple[PrivacyEvent, ...]
    limits: BudgetLimits
    counts_whole: bool
    first_at: str
    last_at: str
    charged: tuple[PrivacyEvent, ...] = ()
    closed: bool = False
    rounds: Mapping[str, Round] = field(default_factory=dict)

    @property
    def counted(self) -> tuple[PrivacyEvent, ...]:
        """The events that the lifetime budget must bear: all declared ones while the run may still go on."""
        return self.planned if self.counts_whole or not self.closed else self.charged


@dataclass(frozen=True)
class Assessment:
    """Why a plan was admitted.

    `run_epsilon` by PLD; `lifetime_epsilon` of all runs as one block; `filter_share` of the lifetime's budget
    (-1 where that budget is too small for the filter); `counts_whole` if only the first-run rule admitted it.
    """

    run_epsilon: float
    lifetime_epsilon: float
    filter_share: float
    counts_whole: bool


def events_to_json(events: Iterable[PrivacyEvent]) -> list[str]:
    """Events as the ledger stores them: the canonical text of each."""
    return [event.to_json() for event in events]


def fits_plan(charged: Iterable[PrivacyEvent], planned: Iterable[PrivacyEvent]) -> bool:
    """Whether what was charged is part of what was declared, counted per noise and sampling rate."""
    allowed = {(noise, rate): count for noise, rate, count in mechanism_counts(planned)}
    return all(count <= allowed.get((noise, rate), 0) for noise, rate, count in mechanism_counts(charged))


def fold_entries(entries: Sequence[Entry]) -> dict[str, Run]:
    """Add up the entries, run by run, in the order in which the runs were declared.

    Raises:
        LedgerError: an entry can't follow from those before it (a commit without a reservation, say).
    """
    runs: dict[str, Run] = {}
    for entry in entries:
        if entry.kind in {"genesis", "moved", "arrived"}:
            continue
        try:
            runs[entry.run_id] = _FOLDS[entry.kind](runs.get(entry.run_id), entry)
        except (KeyError, TypeError, ValueError, FedHypeVAEError) as error:
            raise LedgerError(f"ledger entry {entry.seq} ({entry.kind}) makes no sense: {error!r}") from error
    return runs


def _fold_declare(run: Run | None, entry: Entry) -> Run:
    body = entry.body
    planned = tuple(PrivacyEvent.from_json(event) for event in body["planned"])
    limits = BudgetLimits(**body["limits"])
    whole = bool(body["counts_whole"])
    if run is None:
        return Run(entry.run_id, planned, limits, whole, entry.at, entry.at)
    return replace(
        run, planned=planned, limits=limits, counts_whole=whole or run.counts_whole, last_at=entry.at
    )


def _fold_reserve(run: Run | None, entry: Entry) -> Run:
    if run is None:
        raise ValueError("a reservation for a run that was never declared")
    charged = (*run.charged, *(PrivacyEvent.from_json(event) for event in entry.body["events"]))
    before = run.rounds.get(entry.round_key)
    attempts = 1 if before is None else before.attempts + 1
    rounds = {**run.rounds, entry.round_key: Round(entry.seq, attempts)}
    return replace(run, charged=charged, rounds=rounds, last_at=entry.at)


def _fold_commit(run: Run | None, entry: Entry) -> Run:
    body = entry.body
    before = None if run is None else run.rounds.get(entry.round_key)
    if run is None or before is None or before.reservation != int(body["reservation"]):
        raise ValueError("a commit without its reservation")
    rounds = {**run.rounds, entry.round_key: replace(before, payload_digest=str(body["payload_digest"]))}
    return replace(run, rounds=rounds, last_at=entry.at)


def _fold_close(run: Run | None, entry: Entry) -> Run:
    if run is None:
        raise ValueError("the end of a run that was never declared")
    return replace(run, closed=True, last_at=entry.at)


_FOLDS = {"declare": _fold_declare, "reserve": _fold_reserve, "commit": _fold_commit, "close": _fold_close}


def assess_plan(
    runs: Mapping[str, Run], run_id: str, planned: Sequence[PrivacyEvent], limits: BudgetLimits
) -> Assessment:
    """Whether a run may be declared (or its plan replaced) with these events.

    Args:
        runs: all runs of the ledger.
        run_id: the run that asks.
        planned: all events it may ever be charged for.
        limits: what the site allows now.

    Returns:
        The figures on which it was admitted, for add/remove of one `limits.unit`.

    Raises:
        BudgetExceeded: it does not fit; says what is left and when the rest was spent.

    Source:
        `common.composition` within a run, `common.privacy_filter` across runs.
    """
    delta = limits.lifetime_delta
    others = [run for name, run in runs.items() if name != run_id]
    for run in others:
        if run.limits.unit != limits.unit:
            raise BudgetExceeded(
                f"this ledger protects one {run.limits.unit} (run {run.run_id}); a run that protects one "
                f'{limits.unit} can\'t be added to it: keep `unit = "{run.limits.unit}"` in policy.toml'
            )
    run_epsilon = epsilon_pld(planned, delta)
    if not run_epsilon <= limits.run_epsilon:
        raise BudgetExceeded(
            f"run {run_id} would spend epsilon {run_epsilon:.4g} at delta {delta:g}; the site allows "
            f"{limits.run_epsilon:g} for one run: ask for more noise, fewer steps or a smaller sampling rate"
        )
    spent = [event for run in others for event in run.counted]
    if not filter_allows(spent, planned, limits.lifetime_epsilon, delta):
        raise BudgetExceeded(_what_is_left(run_id, others, spent, planned, limits))
    together = [*spent, *planned]
    share = filter_share_spent(together, limits.lifetime_epsilon, delta)
    return Assessment(
        run_epsilon=run_epsilon,
        lifetime_epsilon=filter_epsilon_spent(together, limits.lifetime_epsilon, delta),
        filter_share=share if math.isfinite(share) else -1.0,
        counts_whole=not share <= 1.0,
    )


def _what_is_left(
    run_id: str,
    others: Sequence[Run],
    spent: Sequence[PrivacyEvent],
    planned: Sequence[PrivacyEvent],
    limits: BudgetLimits,
) -> str:
    """The refusal's text: what the lifetime holds, what is gone, to whom and when."""
    epsilon, delta = limits.lifetime_epsilon, limits.lifetime_delta
    used, asked = (filter_share_spent(events, epsilon, delta) for events in (spent, planned))
    lines = [
        f"run {run_id} asks for {asked:.1%} of the lifetime budget (epsilon {epsilon:g} at delta {delta:g}), "
        f"{used:.1%} is spent or promised (epsilon {filter_epsilon_spent(spent, epsilon, delta):.4g}), "
        f"{max(0.0, 1.0 - used):.1%} is left."
    ]
    for run in others:
        if run.counted:
            state = "closed" if run.closed else "open: counts with all it declared until it is closed"
            lines.append(
                f"Run {run.run_id}: {run.first_at} to {run.last_at}, {len(run.rounds)} rounds, {state}."
            )
    return " ".join(lines)
