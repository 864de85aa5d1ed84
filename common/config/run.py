"""Configuration of a run: frozen models, one per concern, parsed once at the edge from flat keys.

Keys are flat and kebab-case, as in `[tool.flwr.app.config]` and `flwr run --run-config`. Every field below is one key
(`learning_rate` is `learning-rate`). An unknown key, a value out of range and settings that contradict each other are
refused with one line. The code's defaults are the only ones: those behind the README's table. `presets.py` has the
named sets that differ from them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.config.base import Concern
from common.config.federation import LEAST_SITES, FederationConfig
from common.config.generator import ModelConfig, SynthesisConfig, TrainingConfig
from common.config.operation import OperationConfig
from common.config.privacy import PrivacyConfig
from common.config.removed import REMOVED
from common.config.rivals import RivalsConfig
from common.errors import ConfigError

Scalar = str | int | float | bool


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
    operation: OperationConfig = OperationConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.privacy.statistics_share == 0 and self.federation.public_total == 0:
            raise ValueError("statistics-share is 0, so nothing tells the step its scale: set public-total")
        least, sites = self.operation.min_sites, self.federation.num_sites
        if least > sites:
            raise ValueError(f"min-sites is {least} but num-sites is {sites}: lower min-sites")
        if len(self.federation.pools) > 1 and not self.rivals.own_encoders:
            raise ValueError("several pools are of several encoders: set own-encoders, or name one pool")
        if self.federation.robust_statistics != "off" and self.federation.num_sites < LEAST_SITES:
            raise ValueError(f"robust-statistics needs at least {LEAST_SITES} sites, num-sites is less")
        if self.federation.task != "multiclass":
            self._check_findings()
        if self.privacy.trust == "secagg":
            if self.federation.robust_statistics != "off":
                raise ValueError(
                    "robust-statistics needs each site's own statistics: trust secagg shows only their sum"
                )
            self._check_shared_noise()
        return self

    def _check_findings(self) -> None:
        """What is made for one class a record is refused where records have findings."""
        for name, value, needed in (
            ("mmd", self.training.mmd, "off"),
            ("covariance-weight", self.synthesis.covariance_weight, 0.0),
            ("robust-statistics", self.federation.robust_statistics, "off"),
        ):
            if value != needed:
                raise ValueError(f"{name} needs one class a record: set it to {needed} for task {self.federation.task}")

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
                if key in REMOVED:
                    raise ConfigError(f"there is no setting {key} any more: {REMOVED[key]}")
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
        parts = {key: getattr(getattr(self, name), key.replace("-", "_")) for key, name in _CONCERN_OF.items()}
        return {"method": self.method, **parts}

    def replace(self, **changes: Scalar) -> RunConfig:
        """A copy with some flat settings changed (`config.replace(num_rounds=3)`), validated again."""
        return RunConfig.from_flat(
            {**self.to_flat(), **{key.replace("_", "-"): value for key, value in changes.items()}}
        )


_CONCERN_OF: dict[str, str] = {
    field.replace("_", "-"): name
    for name, part in RunConfig.model_fields.items()
    if isinstance(part.default, Concern)
    for field in type(part.default).model_fields
}


def _one_line(error: ValidationError) -> str:
    """The first problem of a validation, as `setting KEY: what was wrong`."""
    first = error.errors()[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    field = first["loc"][-1] if first["loc"] else ""
    if isinstance(field, str) and field.replace("_", "-") in _CONCERN_OF:
        return f"setting {field.replace('_', '-')}: {message}, found {first['input']!r:.200}"
    return message
