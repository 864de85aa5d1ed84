"""What a coordinator sees while a run goes on: a record of each round, and one line of it."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.privacy.composition import epsilon_pld
from common.privacy.events import PrivacyEvent

_PACE_ROUNDS = 10


@dataclass(frozen=True)
class RoundRecord:
    """A finished round, in quantities that may be shown: what was asked, charged and counted, nothing of a loss.

    Attributes:
        number: of the round, from 1. rounds: how many the run has.
        answered: sites whose sums were used. sites: how many the run has.
        missing: site -> why it was not.
        epsilon: site -> ε charged by its ledger for this run so far, at `delta`; add or remove one unit. None where the
            method promises none.
        epsilon_target: the run's ε. delta: δ.
        guaranteed: whether that ε covers all that depends on records, with noise that nobody knows.
        seconds: of this round. seconds_left: estimate for the rounds to come.
        bytes_up: received in this round. bytes_down: sent in it.
    """

    number: int
    rounds: int
    answered: int
    sites: int
    missing: Mapping[str, str]
    epsilon: Mapping[str, float]
    epsilon_target: float
    delta: float
    seconds: float
    seconds_left: float
    bytes_up: int
    bytes_down: int
    guaranteed: bool = True

    @property
    def spent(self) -> float:
        """The largest ε of a site so far; infinite where none is promised."""
        return max(self.epsilon.values(), default=math.inf)

    @property
    def line(self) -> str:
        """The round for a terminal."""
        charge = f"epsilon {self.spent:.2f} of {self.epsilon_target:g}" if self.epsilon else "not private"
        if self.epsilon and not self.guaranteed:
            charge += ", no guarantee"
        return (
            f"round {self.number:>3}/{self.rounds}   sites {self.answered}/{self.sites}   "
            f"{charge}   left {duration(self.seconds_left)}"
        )

    def history(self) -> dict[str, Any]:
        """What a run's summary keeps of the round, JSON-ready; an ε that is not finite is null."""
        epsilon = {site: finite_or_none(value) for site, value in self.epsilon.items()}
        return {
            "round": self.number,
            "seconds": round(self.seconds, 3),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "epsilon": epsilon,
        }


class RoundPrinter:
    """Prints lines to standard output at once."""

    def say(self, text: str) -> None:
        """Print one line."""
        print(text, file=sys.stdout, flush=True)


class Pace:
    """How long a round takes, from the last ten."""

    def __init__(self) -> None:
        """Start the clock: the time left follows from the rounds alone."""
        self._ends = [time.monotonic()]

    def lap(self) -> float:
        """Seconds since the last lap, or the start."""
        self._ends = [*self._ends[-_PACE_ROUNDS:], time.monotonic()]
        return self._ends[-1] - self._ends[-2]

    def left(self, rounds: int) -> float:
        """Seconds that so many more rounds will take."""
        return (self._ends[-1] - self._ends[0]) / max(len(self._ends) - 1, 1) * rounds


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


def duration(seconds: float) -> str:
    """Seconds in words: `1 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def finite_or_none(value: float) -> float | None:
    """A number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None
