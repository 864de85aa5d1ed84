"""What a run's public context may hold, field by field: a server sends it, so nothing in it is trusted.

Every field has a type and a range, and what they make together has a size that a site's machine holds. All limits are
public constants: every site refuses the same contexts.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.config.generator import MMD_FEATURES
from common.config.run import RunConfig
from common.errors import ConfigError
from common.names import MOST_FINDINGS, Task

LONGEST_CONTEXT = 4_000_000  # characters: the names of 4,096 classes, and as many widths as sites
MOST_CLASSES, MOST_DIM, MOST_SITES = 4096, 16_384, 100_000
# Parameters of any network of a run; the largest of the comparison has 3 million.
MOST_PARAMETERS = 100_000_000
_MOST_NOISE = 1e9

ClassName = Annotated[str, Field(min_length=1, max_length=200)]
Width = Annotated[int, Field(ge=1, le=MOST_DIM)]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ProblemFields(_Fields):
    """The fields of `Problem`."""

    dim: Width
    class_names: list[ClassName] = Field(min_length=1, max_length=MOST_CLASSES)
    num_sites: int = Field(ge=1, le=MOST_SITES)
    site_dims: list[Width] = Field(max_length=MOST_SITES)
    task: Task
    label_sets: list[list[Annotated[int, Field(ge=0, lt=MOST_CLASSES)]]] = Field(max_length=MOST_CLASSES)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("class_names must differ from each other")
        if len(self.site_dims) not in (0, self.num_sites):
            raise ValueError("site_dims must be none, or one a site")
        sets = [tuple(one) for one in self.label_sets]
        if len(set(sets)) < len(sets) or any(list(one) != sorted(set(one)) for one in sets):
            raise ValueError("label_sets must be different, and each ascending")
        if any(not one or one[-1] >= len(self.class_names) for one in sets) or (sets and self.task != "multilabel"):
            raise ValueError("label_sets must name findings of a multi-label run")
        if self.task != "multiclass" and len(self.class_names) > MOST_FINDINGS:
            raise ValueError(f"expected at most {MOST_FINDINGS} findings")
        if self.task == "ordinal" and len(self.class_names) < 2:
            raise ValueError("expected two grades or more")
        return self


class PlanFields(_Fields):
    """The fields of `PrivacyPlan`."""

    statistics_noise: float | None = Field(ge=0.0, le=_MOST_NOISE)
    training_noise: float | None = Field(ge=0.0, le=_MOST_NOISE)
    sampling_rate: float = Field(gt=0.0, le=1.0)
    steps_per_round: int = Field(ge=1, le=1000)
    num_rounds: int = Field(ge=0, le=100_000)
    delta: float = Field(gt=0.0, lt=1.0)
    spare_rounds: int = Field(ge=0, le=1000)


class ContextFields(_Fields):
    """A context beside its settings, which `RunConfig` checks."""

    problem: ProblemFields
    plan: PlanFields


def read_context(text: str) -> tuple[RunConfig, ProblemFields, PlanFields]:
    """Parse and check a context.

    Args:
        text: JSON, as anybody may have written it.

    Raises:
        ConfigError: it is too long, no JSON, or a field is missing, unknown, of another type or out of range.
    """
    if len(text) > LONGEST_CONTEXT:
        raise ConfigError(f"the run's context has {len(text)} characters, expected at most {LONGEST_CONTEXT}")
    try:
        values: Any = json.loads(text)
        settings = dict(values.pop("config"))
        fields = ContextFields.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"the run's context: {where}: {first['msg']}, found {first['input']!r:.100}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ConfigError("the run's context can't be read: server and site must run the same version") from None
    config = RunConfig.from_flat(settings)
    if config.federation.task != fields.problem.task:
        raise ConfigError(f"the run's context has the tasks {config.federation.task} and {fields.problem.task}")
    check_size(config, fields.problem)
    return config, fields.problem, fields.plan


def check_size(config: RunConfig, problem: ProblemFields) -> None:
    """Refuse networks that a site's machine would not hold (ConfigError), before any of them is made."""
    largest = max(_parameters(config, max(problem.dim, *problem.site_dims, 1), len(problem.class_names)).values())
    if largest > MOST_PARAMETERS:
        raise ConfigError(f"the run's settings make a network of {largest} parameters, more than {MOST_PARAMETERS}")


def _parameters(config: RunConfig, dim: int, num_classes: int) -> dict[str, int]:
    """At least as many parameters as each network of any method has, by network."""
    model, rivals = config.model, config.rivals
    read = max(model.trunk_width, model.code_dim)
    layers = pairwise((model.latent_dim, *model.widths, dim))
    embedded = model.label_embedding_dim + num_classes
    return {
        "generator": sum(rows * (columns + 1 + 2 * read) for columns, rows in layers)
        + num_classes * (dim + read + 1 + model.label_embedding_dim)
        + (model.trunk_width + model.prior_width) * (model.code_dim + 1)
        + 2 * model.latent_dim * (model.prior_width + embedded),
        "encoder": (dim + num_classes + 1 + 2 * model.latent_dim) * (model.encoder_width + 1),
        "cvae": _dense((dim + num_classes + rivals.noise_dim, *[rivals.cvae_width] * 3, dim + 2 * rivals.noise_dim)),
        "gan": _dense((dim + num_classes + rivals.noise_dim, 2 * rivals.gan_width, 2 * rivals.gan_width, dim)),
        "classifiers": max(_dense((dim, *hidden, num_classes)) for hidden in rivals.hidden_widths_of),
        "statistics": dim * (dim + 1) // 2 if config.synthesis.covariance_weight > 0 else 0,
        "features": MMD_FEATURES * max(num_classes, dim),
        "pairs": 0 if config.federation.task == "multiclass" else num_classes * num_classes,
    }


def _dense(widths: tuple[int, ...]) -> int:
    return sum(math.prod((inputs + 1, outputs)) for inputs, outputs in pairwise(widths))
