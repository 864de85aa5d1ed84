"""What a site's ledger stores: releases as typed privacy events, never as an ε.

An ε computed today under one accountant can't be composed with tomorrow's release; the parameters of the
mechanism can. Every event here is a Gaussian mechanism whose noise standard deviation is `noise_multiplier`
times the L2 sensitivity of what was released, for *add or remove one unit* (a record, or a patient), with or
without Poisson sampling of the units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from common.errors import ConfigError

EventKind = Literal["gaussian", "sampled_gaussian"]

MAX_COUNT = 10_000_000
MAX_NOISE_MULTIPLIER = 1e9
MAX_LABEL_LENGTH = 200
# Less noise than this is none: its square would no longer be a number.
_NO_NOISE = 1e-100
_FIELDS = ("count", "kind", "label", "noise_multiplier", "sampling_rate")


@dataclass(frozen=True)
class PrivacyEvent:
    """`count` releases of one mechanism; neighbouring relation: add or remove one unit.

    Args:
        kind: `gaussian` (every unit takes part) or `sampled_gaussian` (each unit takes part with probability
            `sampling_rate`, drawn afresh for every release).
        noise_multiplier: standard deviation of the noise over the L2 sensitivity, from 0 (no
            privacy) to 10^9.
        sampling_rate: probability in (0, 1]; exactly 1 for `gaussian`.
        count: how many releases, an integer from 1 to 10^7.
        label: what was released, for people; printable, at most 200 characters.

    Raises:
        ConfigError: a field of the wrong type or out of its range.
    """

    kind: EventKind
    noise_multiplier: float
    sampling_rate: float
    count: int
    label: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(EventKind):
            raise ConfigError(f"kind of a privacy event: expected one of {get_args(EventKind)}, found {self.kind!r}")
        sigma = _number("noise_multiplier", self.noise_multiplier)
        rate = _number("sampling_rate", self.sampling_rate)
        if not 0.0 <= sigma <= MAX_NOISE_MULTIPLIER:
            raise ConfigError(f"noise_multiplier: expected a number from 0 to {MAX_NOISE_MULTIPLIER:g}, found {sigma}")
        if not 0.0 < rate <= 1.0:
            raise ConfigError(f"sampling_rate: expected a number in (0, 1], found {rate}")
        if self.kind == "gaussian" and rate != 1.0:
            raise ConfigError(f"sampling_rate of a gaussian event: expected 1, found {rate}; use sampled_gaussian")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= MAX_COUNT:
            raise ConfigError(f"count: expected an integer from 1 to {MAX_COUNT}, found {self.count!r}")
        if not isinstance(self.label, str) or len(self.label) > MAX_LABEL_LENGTH or not self.label.isprintable():
            raise ConfigError(f"label: expected at most {MAX_LABEL_LENGTH} printable characters, found {self.label!r}")
        # One value, one form: -0.0 and integers would otherwise give the same event two texts.
        object.__setattr__(self, "noise_multiplier", sigma + 0.0)
        object.__setattr__(self, "sampling_rate", rate)

    def to_json(self) -> str:
        """The one canonical text of this event: sorted keys, no spaces, shortest exact decimals."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PrivacyEvent:
        """Read the canonical text of an event; any other text, even of an equal event, is refused.

        Args:
            text: what `to_json` wrote.

        Returns:
            The event, with `event.to_json() == text`.

        Raises:
            ConfigError: not JSON, other fields, values out of range, or not in canonical form.
        """
        try:
            fields = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"privacy event: expected a JSON object, found {text!r:.200}") from error
        if not isinstance(fields, dict) or tuple(sorted(fields)) != _FIELDS:
            raise ConfigError(f"privacy event: expected the fields {', '.join(_FIELDS)}, found {text!r:.200}")
        event = cls(**fields)
        if event.to_json() != text:
            raise ConfigError(f"privacy event: expected the canonical text {event.to_json()}, found {text!r:.400}")
        return event


def gaussian(noise_multiplier: float, *, count: int = 1, label: str = "") -> PrivacyEvent:
    """`count` Gaussian releases in which every unit takes part."""
    return PrivacyEvent("gaussian", noise_multiplier, 1.0, count, label)


def sampled_gaussian(noise_multiplier: float, sampling_rate: float, *, count: int = 1, label: str = "") -> PrivacyEvent:
    """`count` Gaussian releases, each over a fresh Poisson sample of the units at `sampling_rate`."""
    return PrivacyEvent("sampled_gaussian", noise_multiplier, sampling_rate, count, label)


MechanismKey = tuple[float, float, int]


def mechanism_counts(events: Iterable[PrivacyEvent]) -> tuple[MechanismKey, ...]:
    """Distinct mechanisms as sorted (noise_multiplier, sampling_rate, count): all that composition depends
    on.

    A sampled event with rate 1 and a plain Gaussian are one mechanism, and equal mechanisms add their counts.
    """
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        sigma = event.noise_multiplier if event.noise_multiplier >= _NO_NOISE else 0.0
        key = (sigma, event.sampling_rate)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(sorted((sigma, rate, count) for (sigma, rate), count in counts.items()))


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}: expected a number, found {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{name}: expected a finite number, found {value!r:.60}")
    return number
