"""Configuration of a run: frozen models, one per concern, parsed once at the edge from flat keys.

Keys are flat and kebab-case, as in `[tool.flwr.app.config]` and `flwr run --run-config`. Every field below is one key
(`learning_rate` is `learning-rate`). An unknown key, a value out of range and settings that contradict each other are
refused with one line. The generator's settings are in `generator.py` beside this module, those of rivals in
`rivals.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.bounds import LEAST_CLIP_NORM
from common.config.base import LARGEST_SEED, Concern, NoneOrSome, Text, Weight
from common.config.generator import ModelConfig, SynthesisConfig, TrainingConfig
from common.config.rivals import RivalsConfig
from common.errors import ConfigError
from common.secagg.assumptions import Assumptions

Scalar = str | int | float | bool
# Sites from which on there is a middle to speak of.
LEAST_SITES = 5
_MOST = 1e6


class PrivacyConfig(Concern):
    """What is promised, and the noise that pays for it.

    `epsilon` may be infinite: no noise is drawn then, and everything the run writes says that it is not private.
    `spare_rounds` are paid for on top of those asked for: a round that a crash interrupts is charged and has to be done
    again. `statistics_share` is the part of the budget (in mu^2 of Gaussian DP) that buys the one-shot statistics.
    `dropouts` and `colluders` are what secure aggregation assumes of the sites; -1 stands for max(1, sites // 10) each.
    """

    epsilon: float = Field(3.0, ge=1e-4, allow_inf_nan=True)
    delta: float = Field(1e-5, ge=1e-15, lt=0.1)
    unit: Literal["record", "patient"] = "record"
    max_records_per_patient: int = Field(4, ge=1, le=64)
    sampling_rate: float = Field(1.0, ge=1e-6, le=1.0)
    clip_norm: float = Field(0.03, ge=LEAST_CLIP_NORM, allow_inf_nan=True)
    statistics_share: NoneOrSome = Field(0.1, ge=0.0, lt=1.0)
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


class FederationConfig(Concern):
    """Who takes part, and the files.

    `pool` is an embedding file (parquet, made by `fedhypevae embed`) that a simulation divides among its sites; empty
    means the demonstration's images, which are public. Another pool counts as public only with `data_is_public`. With
    `own-encoders` there may be several, with commas between: sites take their shares of them in turn.
    `alpha` is the Dirichlet concentration of simulated sites; 0 means IID. `public_total` is a public number of units
    in all, needed where no statistics are released to tell it; it only scales the step.
    `device` is where the sites compute: `auto` takes a GPU where there is one; a site may choose another for itself.
    `robust_statistics` = `trimmed` puts the sites' statistics together so that a few of them can't move the result far
    (`common.privacy.robust`): for five sites or more that noise their own releases; costs accuracy where sites differ.
    `tracking` keeps curves of a run in files below its output folder; nothing of them is sent anywhere.
    """

    num_sites: int = Field(4, ge=1, le=100_000)
    min_sites: int = Field(2, ge=1, le=100_000)
    round_timeout: float = Field(600.0, ge=1e-3, le=1e7)
    alpha: Weight = 0.0
    public_total: int = Field(0, ge=0, le=10**12)
    seed: int = Field(2026, ge=0, le=LARGEST_SEED)
    data_is_public: bool = False
    output_dir: Text = "outputs/run"
    sites_dir: Text = ""
    cache_dir: Text = "outputs/cache"
    pool: Text = ""
    resume: bool = False
    run_name: str = Field("", max_length=200)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")
    robust_statistics: Literal["off", "trimmed"] = "off"
    tracking: Literal["tensorboard", "mlflow", "off"] = "tensorboard"

    @property
    def pools(self) -> tuple[str, ...]:
        """The files of `pool`."""
        return tuple(part.strip() for part in self.pool.split(",") if part.strip())

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_sites > self.num_sites:
            raise ValueError(f"min-sites is {self.min_sites} but num-sites is {self.num_sites}: lower min-sites")
        return self


class RunConfig(BaseModel):
    """Everything a run is made of. Frozen, and saved with every result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field("fedhypevae", max_length=100)
    privacy: PrivacyConfig = PrivacyConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    rivals: RivalsConfig = RivalsConfig()
    federation: FederationConfig = FederationConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.privacy.statistics_share == 0 and self.federation.public_total == 0:
            raise ValueError("statistics-share is 0, so nothing tells the step its scale: set public-total")
        if self.rivals.own_encoders and not self.method.startswith("mh_pfedhn"):
            raise ValueError(f"own-encoders needs a method that makes each site its own model: {self.method} does not")
        if len(self.federation.pools) > 1 and not self.rivals.own_encoders:
            raise ValueError("several pools are of several encoders: set own-encoders, or name one pool")
        if self.federation.robust_statistics != "off" and self.federation.num_sites < LEAST_SITES:
            raise ValueError(f"robust-statistics needs at least {LEAST_SITES} sites, num-sites is less")
        if self.privacy.trust == "secagg":
            if self.federation.robust_statistics != "off":
                raise ValueError(
                    "robust-statistics needs each site's own statistics: trust secagg shows only their sum"
                )
            self._check_shared_noise()
        return self

    def _check_shared_noise(self) -> None:
        """What secure aggregation can't protect is refused here, before any site is asked."""
        if not math.isfinite(self.privacy.epsilon):
            raise ValueError("trust secagg needs a finite epsilon: without noise there is nothing to share")
        if self.training.local_steps != 1:
            raise ValueError("trust secagg needs local-steps 1: later steps would see the first one's noise as a share")
        if self.privacy.encoder_training == "unprotected":
            raise ValueError("trust secagg needs encoder-training sleep or joint: unprotected promises nothing")
        try:
            self.privacy.assumptions(self.federation.num_sites)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @classmethod
    def from_flat(cls, values: Mapping[str, Scalar]) -> RunConfig:
        """Parse flat kebab-case keys.

        Args:
            values: key -> value; keys that are left out take their defaults.

        Returns:
            The frozen configuration.

        Raises:
            ConfigError: "unknown setting ..." with the nearest known one, or "setting KEY: ..." for a bad value.
        """
        nested: dict[str, Any] = {}
        for key, value in values.items():
            if key == "method":
                nested["method"] = value
                continue
            concern = _CONCERN_OF.get(key)
            if concern is None:
                near = difflib.get_close_matches(key, [*_CONCERN_OF, "method"], n=1)
                hint = f"; did you mean {near[0]}?" if near else "; see the list of settings in README.md"
                raise ConfigError(f"unknown setting {key!r:.100}{hint}")
            nested.setdefault(concern, {})[key.replace("-", "_")] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    def to_flat(self) -> dict[str, Scalar]:
        """The same configuration as flat kebab-case keys: `from_flat(to_flat())` gives it back."""
        flat: dict[str, Scalar] = {"method": self.method}
        for concern in _CONCERNS:
            for field, value in getattr(self, concern).model_dump().items():
                flat[field.replace("_", "-")] = value
        return flat

    def replace(self, **changes: Scalar) -> RunConfig:
        """A copy with some flat settings changed (`config.replace(num_rounds=3)`), validated again."""
        return RunConfig.from_flat(
            {**self.to_flat(), **{key.replace("_", "-"): value for key, value in changes.items()}}
        )


_CONCERNS: dict[str, type[Concern]] = {
    "privacy": PrivacyConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "synthesis": SynthesisConfig,
    "rivals": RivalsConfig,
    "federation": FederationConfig,
}
_CONCERN_OF = {field.replace("_", "-"): concern for concern, cls in _CONCERNS.items() for field in cls.model_fields}


def _one_line(error: ValidationError) -> str:
    """The first problem of a validation, as `setting KEY: what was wrong`."""
    first = error.errors()[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    field = first["loc"][-1] if first["loc"] else ""
    if isinstance(field, str) and field.replace("_", "-") in _CONCERN_OF:
        return f"setting {field.replace('_', '-')}: {message}, found {first['input']!r:.200}"
    return message
