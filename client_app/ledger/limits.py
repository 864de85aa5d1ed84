"""What a site allows to be spent: the part of its policy that the ledger enforces."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import LedgerError

# Three runs of epsilon 3 at delta 1e-5 fit the privacy filter: one, one with what it taught, and one of a later study.
LIFETIME_EPSILON = 7.0


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
