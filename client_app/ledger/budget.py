"""Whether one more run fits into the budget. Pure functions: nothing here reads or writes a file. The rules:

- Within a run, whose events are declared before its first round, privacy loss distributions compose the whole
  plan.
- Across runs, each chosen after the results of those before were seen, an RDP filter composes (adaptive
  composition). A run that is still open counts with all it declared, so that two runs at once can't overspend
  together; a closed one with what it was charged for.
- The very first run may be admitted on its PLD bound alone, which is tighter; such a run counts whole for
  ever, since mixing the two bounds after an early stop has no proof. For the same reason its plan can't grow
  once something was released, unless the filter has room for all of it.

Neighbouring relation: add or remove one unit (`BudgetLimits.unit`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client_app.ledger.limits import BudgetLimits
from client_app.ledger.runs import Run
from common.errors import BudgetExceeded
from common.privacy.composition import epsilon_pld
from common.privacy.events import PrivacyEvent
from common.privacy.filter import filter_allows, filter_epsilon_spent, filter_share_spent


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


def assess_plan(
    runs: Mapping[str, Run],
    run_id: str,
    planned: Sequence[PrivacyEvent],
    limits: BudgetLimits,
    *,
    chosen_late: bool = False,
) -> Assessment:
    """Whether a run may be declared (or its plan replaced) with these events.

    Args:
        runs: all runs of the ledger.
        run_id: the run that asks.
        planned: all events it may ever be charged for.
        limits: what the site allows now.
        chosen_late: the plan is another than the one declared before the run's first release (a round more, to
            repeat one): it must pass the filter, whichever rule admitted the run.

    Returns:
        The figures on which it was admitted, for add/remove of one `limits.unit`.

    Raises:
        BudgetExceeded: it does not fit; says what is left and when the rest was spent.

    Source:
        `common.privacy.composition` within a run, `common.privacy.filter` across runs.
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
    together = [*spent, *planned]
    share = filter_share_spent(together, limits.lifetime_epsilon, delta)
    if not share <= 1.0 and (chosen_late or not filter_allows(spent, planned, limits.lifetime_epsilon, delta)):
        raise BudgetExceeded(_what_is_left(run_id, others, spent, planned, limits))
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
            lines.append(f"Run {run.run_id}: {run.first_at} to {run.last_at}, {len(run.rounds)} rounds, {state}.")
    return " ".join(lines)
