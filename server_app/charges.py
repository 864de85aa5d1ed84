"""What an honest site's ledger can hold against a run: what a site says that it was charged is held against it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from common.errors import ConfigError, WireError
from common.methods.base import Method, RunContext
from common.methods.shared_sums import assumptions_of
from common.privacy.events import PrivacyEvent
from common.secagg.assumptions import charged_events

# A site that crashes is charged for every attempt, and a server that is resumed asks again: room for that.
_ATTEMPTS = 10
_ROOM = 100


@dataclass(frozen=True)
class Charges:
    """The events that a site can have been charged for this run.

    Attributes:
        most: canonical text of one release -> how many of it there can be; empty where the run is not protected.
        least: the same of what a site has sent: one that tells of fewer would keep the run of all from being published.
    """

    most: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, method: Method, context: RunContext) -> Charges:
        """The plan's events, and under secure aggregation the worse ones of a site that fears more colluders."""
        if not (method.private and math.isfinite(context.config.privacy.epsilon)):
            return cls()
        plan = context.plan
        most: dict[str, int] = {}
        for events in _charged_ways(context, plan.statistics_events + plan.round_events):
            for event in events:
                rounds = 1 if event.label == "statistics" else plan.num_rounds + plan.spare_rounds
                most[one_release(event)] = _ATTEMPTS * event.count * rounds + _ROOM
        return cls(most)

    def at_least(self, before: Iterable[PrivacyEvent], released: Iterable[PrivacyEvent]) -> Charges:
        """What a site can have been charged: no fewer releases of a kind than it reported before, or than it made."""
        least: dict[str, int] = {}
        for events in (before, released) if self.most else ():
            counts = Counter[str]()
            for event in events:
                counts[one_release(event)] += event.count
            least = {text: max(least.get(text, 0), counts[text]) for text in {*least, *counts}}
        return replace(self, least=least)

    def check(self, reported: Iterable[tuple[PrivacyEvent, int]]) -> tuple[PrivacyEvent, ...]:
        """Hold what a site says against what the run can have cost it.

        Args:
            reported: events of its ledger, each with how often it follows itself.

        Returns:
            Each mechanism once, with the number of its releases.

        Raises:
            WireError: nothing was charged though the run is, or an event is not of this run, or there are too many or
                too few.
        """
        found: dict[str, int] = {}
        for event, times in reported:
            text = one_release(event)
            found[text] = found.get(text, 0) + event.count * times
            if text not in self.most:
                raise WireError("word charged names an event that this run does not have; nothing of it is used")
            if found[text] > self.most[text]:
                raise WireError("word charged counts more releases than this run can have; nothing of it is used")
        if self.most and not found:
            raise WireError("word charged is empty, though every release of this run is charged")
        if any(found.get(text, 0) < count for text, count in self.least.items()):
            raise WireError("word charged counts fewer releases than the site has sent; nothing of it is used")
        return tuple(replace(PrivacyEvent.from_json(text), count=count) for text, count in found.items())


NO_CHARGES = Charges()


def one_release(event: PrivacyEvent) -> str:
    """Canonical text of one release of an event's mechanism."""
    return replace(event, count=1).to_json()


def _charged_ways(context: RunContext, events: tuple[PrivacyEvent, ...]) -> Iterator[tuple[PrivacyEvent, ...]]:
    """The run's events as its sites may be charged them: one way for each number of colluders that a policy fears."""
    yield events
    if context.config.privacy.trust == "local":
        return
    assumptions = assumptions_of(context)
    for colluders in range(assumptions.colluders + 1, assumptions.num_sites):
        try:
            yield charged_events(events, assumptions, colluders)
        except ConfigError:  # with so many colluders the protocol hides nothing, and the site refuses
            return
