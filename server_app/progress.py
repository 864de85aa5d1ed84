"""What a coordinator sees while a run goes on: one line a round."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping

from common.composition import epsilon_pld
from common.events import PrivacyEvent
from common.methods.base import RunContext
from server_app.checkpoint import Progress

_PACE_ROUNDS = 10


class RoundPrinter:
    """Prints rounds, sites, ε spent and time left to standard output, line by line."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def start(self) -> None:
        """Note that the rounds begin now: the time left is told from the rounds alone."""
        self._ends = [time.monotonic()]

    def say(self, text: str) -> None:
        """Print one line at once."""
        print(text, file=sys.stdout, flush=True)

    def round(self, number: int, context: RunContext, progress: Progress, num_sites: int) -> None:
        """Print the line of a finished round."""
        plan = context.plan
        self._ends.append(time.monotonic())
        recent = self._ends[-_PACE_ROUNDS - 1 :]
        pace = (recent[-1] - recent[0]) / max(len(recent) - 1, 1)
        left = _duration(pace * (plan.num_rounds - number))
        spent = max(epsilon_per_site(progress.charged, plan.delta).values(), default=0.0)
        target = context.config.privacy.epsilon
        self.say(
            f"round {number:>3}/{plan.num_rounds}   sites {len(progress.taken_part[-1])}/{num_sites}   "
            f"epsilon {spent:.2f} of {target:g}   left {left}"
        )


def epsilon_per_site(charged: Mapping[str, str], delta: float) -> dict[str, float]:
    """ε of everything that each site's ledger charged for this run, at δ; add or remove one unit.

    Args:
        charged: site -> JSON list of events.
        delta: δ.

    Returns:
        Site -> ε; infinite where noise was zero.
    """
    return {site: epsilon_pld(read_events(text), delta) for site, text in charged.items()}


def read_events(text: str) -> list[PrivacyEvent]:
    """Events from the JSON list that a site's ledger wrote."""
    return [PrivacyEvent.from_json(event) for event in json.loads(text)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
