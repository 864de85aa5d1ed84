"""The site's own policy: what a server may ask for, checked before the data is opened; refusals cost nothing.

The policy is a TOML file that lives at the site, outside the app. Whatever it does not mention takes the
value that protects most; what it mentions and we don't know is refused, since a misspelt limit would limit
nothing.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from client_app.ledger.limits import BudgetLimits
from client_app.policy.request import RunRequest, nonsense_in
from common.bounds import LEAST_CLIP_NORM
from common.errors import ConfigError, PolicyRefusal
from common.privacy.composition import epsilon_pld
from common.texts import read_toml

Unit = Literal["record", "patient"]
EncoderTraining = Literal["sleep", "joint", "unprotected"]
_CLAIM_TOLERANCE = 1e-6  # relative; a claim is compared with the same accountant's figure


class SitePolicy(BaseModel):
    """What a site allows. Frozen; unknown keys and values out of range are refused.

    `lifetime_epsilon` at `lifetime_delta` bounds all runs together, `run_epsilon` one run at the same δ; both
    for adding or removing one `unit`. Keep `run_epsilon` a little above what runs ask for, so that a round
    that has to be computed again after a crash still fits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    cohort_id: str = Field(min_length=1, max_length=200)
    lifetime_epsilon: float = Field(gt=0.0, le=100.0)
    lifetime_delta: float = Field(gt=0.0, le=1e-2)
    run_epsilon: float = Field(gt=0.0, le=100.0)
    unit: Unit = "record"
    max_records_per_patient: Annotated[int, Field(ge=1, le=10_000)] | None = None
    min_clip_norm: float = Field(default=LEAST_CLIP_NORM, ge=LEAST_CLIP_NORM)
    max_clip_norm: float = Field(default=10.0, gt=0.0)
    max_sampling_rate: float = Field(default=1.0, gt=0.0, le=1.0)
    min_noise_multiplier: float = Field(default=0.5, gt=0.0)
    max_num_steps: int = Field(default=100_000, ge=0)
    allowed_methods: tuple[str, ...] = ("fedhypevae",)
    allowed_encoder_training: tuple[EncoderTraining, ...] = ("sleep",)
    allowed_trust: tuple[str, ...] = ("local",)
    least_colluders: int = Field(default=1, ge=0)
    data_is_public: bool = False
    metrics_may_leave: bool = False
    allow_test_noise: bool = False
    approved_app_digests: tuple[str, ...] = ()
    close_idle_runs_after_hours: float = Field(default=72.0, gt=0.0, le=10_000.0)
    ledger: str = "ledger.db"
    witness: str = ""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.run_epsilon > self.lifetime_epsilon:
            raise ValueError("run_epsilon is larger than lifetime_epsilon: lower it")
        if self.min_clip_norm > self.max_clip_norm:
            raise ValueError("min_clip_norm is larger than max_clip_norm: lower it")
        if self.unit == "patient" and self.max_records_per_patient is None:
            raise ValueError("unit is patient but max_records_per_patient is missing: set the cap, such as 4")
        if self.metrics_may_leave and not self.data_is_public:
            raise ValueError("metrics_may_leave needs data_is_public: scores on patients' data tell about them")
        if self.allow_test_noise and not self.data_is_public:
            raise ValueError("allow_test_noise needs data_is_public: noise from a known seed protects nobody")
        if not all(re.fullmatch("[0-9a-fA-F]{64}", digest) for digest in self.approved_app_digests):
            raise ValueError("approved_app_digests must be SHA-256 digests of 64 hexadecimal digits")
        return self

    @property
    def limits(self) -> BudgetLimits:
        """The part that the ledger enforces."""
        return BudgetLimits(self.lifetime_epsilon, self.lifetime_delta, self.run_epsilon, self.unit)

    @property
    def close_idle_runs_after(self) -> timedelta:
        """How long a run may be silent before another may have what it did not use."""
        return timedelta(hours=self.close_idle_runs_after_hours)

    def ledger_path(self, folder: Path) -> Path:
        """The ledger's file; a relative name counts from the policy's folder."""
        return folder / self.ledger

    def witness_path(self, folder: Path) -> Path | None:
        """Where the ledger's head is also kept; None if the policy names no such place."""
        return folder / self.witness if self.witness else None

    def check(self, request: RunRequest, *, recompute_epsilon: bool = True) -> None:
        """Refuse what the site does not allow, before any data is opened.

        Args:
            request: what the server asks of this site for one whole run.
            recompute_epsilon: compute ε from the request's events (takes seconds in a fresh process). Leave
                it out only for a run whose same plan the ledger has granted under the same limits already.

        Raises:
            PolicyRefusal: `rule` names the line of the policy that forbids it; nothing was charged.
        """
        problem = nonsense_in(request)
        if problem is not None:
            raise PolicyRefusal("request", f"the server's request makes no sense: {problem}; nothing was charged")
        for rule, field, broken in self._rules(request):
            if broken:
                allowed, asked = getattr(self, rule), getattr(request, field)
                line = f"policy rule {rule} allows {allowed!r}, the server asks for {asked!r}; nothing was charged"
                raise PolicyRefusal(rule, line)
        if recompute_epsilon and request.protected:
            self._check_epsilon(request)

    def _rules(self, request: RunRequest) -> tuple[tuple[str, str, bool], ...]:
        """The cheap rules in the order of the report: name, the request's field, and whether the request breaks it."""
        noise = [*request.noise_multipliers, *(event.noise_multiplier for event in request.events)]
        sampled = (event.sampling_rate for event in request.events if event.kind != "gaussian")
        rates, cap, protected = [request.sampling_rate, *sampled], self.max_records_per_patient, request.protected
        too_many = self.unit == "patient" and (cap is None or request.max_records_per_patient > cap)
        least_noise, training = min(noise, default=math.inf), request.encoder_training
        return (
            ("allowed_methods", "method", request.method not in self.allowed_methods),
            ("allowed_encoder_training", "encoder_training", training not in self.allowed_encoder_training),
            ("allowed_trust", "trust", request.trust not in self.allowed_trust),
            ("unit", "unit", request.unit != self.unit),
            ("max_records_per_patient", "max_records_per_patient", too_many),
            ("data_is_public", "epsilon", not protected and not self.data_is_public),
            ("allow_test_noise", "noise", request.noise != "secure" and not self.allow_test_noise),
            ("metrics_may_leave", "wants_metrics", request.wants_metrics and not self.metrics_may_leave),
            ("min_clip_norm", "clip_norm", protected and request.clip_norm < self.min_clip_norm),
            ("max_clip_norm", "clip_norm", protected and request.clip_norm > self.max_clip_norm),
            ("max_sampling_rate", "sampling_rate", max(rates) > self.max_sampling_rate),
            ("min_noise_multiplier", "noise_multipliers", protected and least_noise < self.min_noise_multiplier),
            ("max_num_steps", "num_steps", request.num_steps > self.max_num_steps),
            ("lifetime_delta", "delta", protected and request.delta > self.lifetime_delta),
        )

    def _check_epsilon(self, request: RunRequest) -> None:
        """Recompute ε from the events: at the site's δ for its limits, at the server's for its claim."""
        epsilon = epsilon_pld(request.events, self.lifetime_delta)
        limits = {"run_epsilon": self.run_epsilon, "lifetime_epsilon": self.lifetime_epsilon}
        for rule, allowed in limits.items():
            if not epsilon <= allowed:
                raise PolicyRefusal(
                    rule,
                    f"policy rule {rule} allows {allowed:g} at delta {self.lifetime_delta:g}, the run would "
                    f"spend {epsilon:.4g}; nothing was charged",
                )
        claimed = epsilon_pld(request.announced or request.events, request.delta)
        if not claimed <= request.epsilon * (1.0 + _CLAIM_TOLERANCE):
            raise PolicyRefusal(
                "epsilon",
                f"the server claims epsilon {request.epsilon:g} at delta {request.delta:g}, its events spend "
                f"{claimed:.4g}; nothing was charged",
            )


def load_policy(path: Path) -> SitePolicy:
    """Read a site's policy file.

    Args:
        path: `policy.toml`.

    Returns:
        The frozen policy.

    Raises:
        ConfigError: the file is missing or no TOML, or a line is unknown, out of range or contradicts
            another.
    """
    try:
        values = read_toml(path)
    except FileNotFoundError:
        raise ConfigError(
            f"no policy at {path}: a site without one releases nothing; write one with `fedhypevae provision`"
        ) from None
    except (OSError, ConfigError) as error:
        raise ConfigError(f"can't read policy {path}: {error}") from None
    try:
        return SitePolicy(**{key: _frozen(value) for key, value in values.items()})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'policy'}: {item['msg']}" for item in error.errors()
        )
        raise ConfigError(f"policy {path} can't be used: {problems}") from None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
