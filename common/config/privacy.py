"""Settings of the promise: what is promised, and the noise that pays for it."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from common.bounds import LEAST_CLIP_NORM
from common.config.base import Concern, NoneOrSome
from common.secagg.assumptions import Assumptions

_MOST = 1e6


class PrivacyConfig(Concern):
    """What is promised, and the noise that pays for it.

    `epsilon` may be infinite: no noise is drawn then, and everything the run writes says that it is not private.
    `spare_rounds` are paid for on top of those asked for: a round that a crash interrupts is charged and has to be done
    again. `statistics_share` is the part of the budget (in mu^2 of Gaussian DP) that buys the one-shot statistics.
    `max_positives` and `max_unknowns` say how many findings of a record may be present, or unknown, before the
    statistics of a multi-label run scale the record down; higher caps mean more noise.
    `dropouts` and `colluders` are what secure aggregation assumes of the sites; -1 stands for max(1, sites // 10) each.
    """

    epsilon: float = Field(3.0, ge=1e-4, allow_inf_nan=True)
    delta: float = Field(1e-5, ge=1e-15, lt=0.1)
    unit: Literal["record", "patient"] = "record"
    max_records_per_patient: int = Field(2, ge=1, le=64)
    max_positives: int = Field(2, ge=1, le=64)
    max_unknowns: int = Field(4, ge=0, le=4096)
    sampling_rate: float = Field(1.0, ge=1e-6, le=1.0)
    clip_norm: float = Field(0.03, ge=LEAST_CLIP_NORM, allow_inf_nan=True)
    statistics_share: NoneOrSome = Field(0.02, ge=0.0, lt=1.0)
    spare_rounds: int = Field(1, ge=0, le=1000)
    encoder_training: Literal["sleep", "joint", "unprotected"] = "sleep"
    noise: Literal["secure", "test"] = "secure"
    trust: Literal["local", "secagg"] = "local"
    dropouts: int = Field(-1, ge=-1, le=100_000)
    colluders: int = Field(-1, ge=-1, le=100_000)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if math.isfinite(self.epsilon) and not math.isfinite(self.clip_norm):
            raise ValueError(
                f"clip-norm is infinite while epsilon is {self.epsilon}: no noise covers an unbounded record"
            )
        for name, value in (("epsilon", self.epsilon), ("clip-norm", self.clip_norm)):
            if _MOST < value < math.inf:
                raise ValueError(f"{name} must be at most {_MOST:g}, or infinite in a run without noise, found {value}")
        return self

    @property
    def records_per_unit(self) -> int:
        """The public cap on the records that one unit contributes to a step."""
        return self.max_records_per_patient if self.unit == "patient" else 1

    def assumptions(self, num_sites: int) -> Assumptions:
        """What secure aggregation assumes of so many sites (ConfigError: too few of them)."""
        return Assumptions.of(num_sites, self.dropouts, self.colluders)

    @property
    def certified(self) -> bool:
        """Whether a run with these settings has an end-to-end guarantee."""
        return math.isfinite(self.epsilon) and self.noise == "secure" and self.encoder_training != "unprotected"
