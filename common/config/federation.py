"""Settings of who takes part, and of simulated sites."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.base import LARGEST_SEED, Concern, Text, Weight
from common.names import Task

# Sites from which on there is a middle to speak of.
LEAST_SITES = 5


class FederationConfig(Concern):
    """Who takes part, what their labels mean, and what simulated sites are made of.

    `task` is what the labels of every site are: one class a record, several findings (`multilabel`), or a grade
    (`ordinal`); a site whose file holds another task is refused.
    `pool` is an embedding file (parquet, made by `fedhypevae embed`) that a simulation divides among its sites; empty
    means the demonstration's images, which are public. Another pool counts as public only with `data_is_public`. With
    `own-encoders` there may be several, with commas between: sites take their shares of them in turn.
    `alpha` is the Dirichlet concentration of simulated sites; 0 means IID. `public_total` is a public number of units
    in all, needed where no statistics are released to tell it; it only scales the step.
    `robust_statistics` = `trimmed` puts the sites' statistics together so that a few of them can't move the result far
    (`common.privacy.robust`): for five sites or more that noise their own releases; costs accuracy where sites differ.
    """

    task: Task = "multiclass"
    num_sites: int = Field(4, ge=1, le=100_000)
    alpha: Weight = 0.0
    public_total: int = Field(0, ge=0, le=10**12)
    seed: int = Field(2026, ge=0, le=LARGEST_SEED)
    data_is_public: bool = False
    pool: Text = ""
    robust_statistics: Literal["off", "trimmed"] = "off"

    @property
    def pools(self) -> tuple[str, ...]:
        """The files of `pool`."""
        return tuple(part.strip() for part in self.pool.split(",") if part.strip())
