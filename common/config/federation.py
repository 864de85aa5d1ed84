"""Settings of who takes part, of simulated sites, and of operation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from common.config.base import LARGEST_SEED, Concern, Text, Weight

# Sites from which on there is a middle to speak of.
LEAST_SITES = 5


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
