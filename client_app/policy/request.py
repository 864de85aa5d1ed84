"""What a server asks of a site for one run, and whether it makes sense at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from common.bounds import LEAST_CLIP_NORM
from common.privacy.events import PrivacyEvent


@dataclass(frozen=True)
class RunRequest:
    """One whole run as the server proposes it. Nothing in it is trusted before `SitePolicy.check`.

    Args:
        method: name of the method.
        epsilon: ε that the server claims for the run, at `delta`; infinite: a run without protection.
        delta: δ of the claim.
        unit: `record` or `patient`.
        clip_norm: C, the largest norm of one unit's contribution.
        noise_multipliers: σ of every kind of release.
        sampling_rate: q of the private steps, in (0, 1].
        num_steps: T, private steps in the whole run, each once per local step.
        encoder_training: `sleep`, `joint` or `unprotected`.
        events: every release of the run, statistics included; what the ledger will charge.
        max_records_per_patient: cap on the records used of one patient.
        noise: `secure`, or `test` for noise from a known seed.
        wants_metrics: whether scores on the site's data are to travel.
        trust: `local` or `secagg`.
        announced: the events that the server counts, where the site is charged worse ones; empty: the same.
    """

    method: str
    epsilon: float
    delta: float
    unit: str
    clip_norm: float
    noise_multipliers: tuple[float, ...]
    sampling_rate: float
    num_steps: int
    encoder_training: str
    events: tuple[PrivacyEvent, ...]
    max_records_per_patient: int = 1
    noise: str = "secure"
    wants_metrics: bool = False
    trust: str = "local"
    announced: tuple[PrivacyEvent, ...] = ()

    @property
    def protected(self) -> bool:
        """Whether the run claims any protection; False only where the server openly asks for none."""
        return not (isinstance(self.epsilon, float) and self.epsilon == math.inf)


def nonsense_in(request: Any) -> str | None:
    """The first thing about a request that no honest server would send; None if it makes sense.

    Args:
        request: as received; its fields may be of any type.

    Returns:
        A line that names the field, what was expected and what was found.
    """
    for field in ("method", "unit", "encoder_training", "noise", "trust"):
        if not isinstance(getattr(request, field), str):
            return f"{field} must be a word, found {short(getattr(request, field))}"
    if not isinstance(request.wants_metrics, bool):
        return f"wants_metrics must be true or false, found {short(request.wants_metrics)}"
    if request.noise not in ("secure", "test"):
        return f"noise must be secure or test, found {short(request.noise)}"
    if not _is_number(request.epsilon, least=0.0, most=math.inf) or request.epsilon == 0.0:
        return f"epsilon must be above 0, found {short(request.epsilon)}"
    if not _is_number(request.delta, least=0.0, most=1.0) or request.delta in (0.0, 1.0):
        return f"delta must lie between 0 and 1, found {short(request.delta)}"
    if not _is_number(request.clip_norm, least=LEAST_CLIP_NORM, most=math.inf):
        return f"clip_norm must be at least {LEAST_CLIP_NORM:g}, found {short(request.clip_norm)}"
    if not _is_number(request.sampling_rate, least=0.0, most=1.0) or request.sampling_rate == 0.0:
        return f"sampling_rate must lie in (0, 1], found {short(request.sampling_rate)}"
    for field, least in (("num_steps", 0), ("max_records_per_patient", 1)):
        value = getattr(request, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return f"{field} must be a whole number of at least {least}, found {short(value)}"
    if not isinstance(request.noise_multipliers, tuple) or not all(
        _is_number(value, least=0.0, most=1e12) for value in request.noise_multipliers
    ):
        return f"noise_multipliers must be numbers of at least 0, found {short(request.noise_multipliers)}"
    return _nonsense_in_events(request)


def _nonsense_in_events(request: Any) -> str | None:
    """Whether the events are those of the settings: else what is checked would not be what is charged."""
    events = request.events
    for some in (events, request.announced):
        if not isinstance(some, tuple) or not all(isinstance(event, PrivacyEvent) for event in some):
            return "events must be privacy events"
    if not request.protected:
        return None
    if not events:
        return "a protected run releases something, so it has at least one event"
    for event in events:
        if event.noise_multiplier not in request.noise_multipliers:
            return f"event {event.label!r} has a noise multiplier that noise_multipliers does not list"
        if event.kind == "sampled_gaussian" and event.sampling_rate != request.sampling_rate:
            return f"event {event.label!r} is not sampled at sampling_rate {request.sampling_rate!r}"
    steps = sum(event.count for event in events if event.sampling_rate == request.sampling_rate)
    if steps < request.num_steps:
        return f"num_steps is {request.num_steps}, but the events hold {steps} of them"
    return None


def short(value: object) -> str:
    """A value as it may stand in a message: a server can send a megabyte where a word was expected."""
    return f"{value!r:.120}"


def _is_number(value: object, *, least: float, most: float) -> bool:
    """Whether it is a real number in [least, most]; NaN is in no interval."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return least <= value <= most
