"""Settings of the generator: its sizes, its training, and what the server does with it afterwards."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from common.concern import Concern


class ModelConfig(Concern):
    """Sizes of the generator. `hidden_widths` is a comma-separated list; empty means a linear decoder.

    `residual_energy` is the share of a unit-norm embedding's squared length that the observation noise carries: the
    decoder's variance is residual_energy / d_x in every coordinate, a public constant.
    """

    latent_dim: int = Field(4, ge=0, le=512)
    code_dim: int = Field(2, ge=0, le=512)
    hidden_widths: str = ""
    trunk_width: int = Field(0, ge=0, le=1024)
    prior_width: int = Field(8, ge=1, le=1024)
    label_embedding_dim: int = Field(4, ge=1, le=512)
    encoder_width: int = Field(64, ge=1, le=4096)
    residual_energy: float = Field(0.67, gt=0.0)
    init_seed: int = Field(7, ge=0)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the decoder's hidden layers."""
        return tuple(int(part) for part in self.hidden_widths.split(",") if part.strip())

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        try:
            widths = self.widths
        except ValueError:
            raise ValueError("hidden-widths must be whole numbers with commas between, such as 64,128") from None
        if any(not 1 <= width <= 8192 for width in widths):
            raise ValueError("hidden-widths must lie between 1 and 8192")
        if widths and self.latent_dim == 0:
            raise ValueError("hidden-widths need a latent: set latent-dim above 0, or leave hidden-widths empty")
        return self


class TrainingConfig(Concern):
    """The optimisation. Rates act on sums divided by (clip norm x sampling rate x released total).

    `sphere` scales every embedding to unit length (a public map of one record); `centre` subtracts the released mean;
    `feature_norm` clips what is left. `embedding_radius` is the public norm to which embeddings are clipped for the
    statistics.

    `score_noise` bounds the rates by what noise alone does: the standard deviation that it gives a class score of a
    record of norm `feature_norm` by the last round, from public and released numbers; 0 leaves the rates as they are.
    `logit_adjustment` is the weight of the released class shares' logarithm in the discriminative term: with 1 the
    classes' scores hold for classes of equal size, as the synthetic set has them, however rare a class is at the sites.
    `class_presence` lets a site's sums count, class by class, as much as the site is likely to have the class at all,
    by its released counts (`common.presence`): free, and less noise where classes are spread unevenly.
    """

    num_rounds: int = Field(25, ge=0, le=100_000)
    local_steps: int = Field(1, ge=1, le=1000)
    learning_rate: float = Field(8.0, gt=0.0)
    generator_rate: float = Field(0.02, ge=0.0)
    code_rate: float = Field(0.05, ge=0.0)
    momentum: float = Field(0.8, ge=0.0, lt=1.0)
    averaging_fraction: float = Field(0.35, ge=0.0, le=1.0)
    sphere: bool = True
    centre: bool = True
    embedding_radius: float = Field(1.0, gt=0.0)
    feature_norm: float = Field(0.7, gt=0.0)
    class_bias_scale: float = Field(0.117, gt=0.0)
    score_noise: float = Field(1.8, ge=0.0)
    class_presence: bool = True
    discriminative_weight: float = Field(1.0, ge=0.0)
    logit_adjustment: float = Field(1.0, ge=0.0, le=2.0)
    elbo_weight: float = Field(0.05, ge=0.0)
    kl_weight: float = Field(1.0, ge=0.0)
    code_penalty: float = Field(1e-3, ge=0.0)
    code_radius: float = Field(0.1, gt=0.0)
    lipschitz_bound: float = Field(1.0, gt=0.0)
    lipschitz_penalty: float = Field(0.0, ge=0.0)
    mmd: Literal["off", "released", "per-example"] = "off"
    mmd_weight: float = Field(0.0, ge=0.0)
    mmd_features: int = Field(64, ge=2, le=4096)
    mmd_bandwidths: str = "0.5,1.0,2.0"
    sleep_steps: int = Field(5, ge=0)
    encoder_rate: float = Field(2e-3, gt=0.0)

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """Bandwidths of the Gaussian kernels, public constants in units of the embedding's norm."""
        return tuple(float(part) for part in self.mmd_bandwidths.split(",") if part.strip())

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            bandwidths = self.bandwidths
        except ValueError:
            raise ValueError("mmd-bandwidths must be numbers with commas between, such as 0.5,1,2") from None
        if not bandwidths or any(not (0 < width < math.inf) for width in bandwidths):
            raise ValueError("mmd-bandwidths must be at least one number above 0")
        if self.mmd == "off" and self.mmd_weight > 0:
            raise ValueError("mmd-weight is above 0 while mmd is off: set mmd to released or per-example")
        if self.discriminative_weight == 0 and self.elbo_weight == 0:
            raise ValueError("discriminative-weight and elbo-weight are both 0: nothing would be trained")
        return self


class SynthesisConfig(Concern):
    """What the server does after training: free, since it touches released values alone.

    `relabel` gives each synthetic row the class that the generator's own posterior finds likeliest there, or one
    drawn from that posterior, flattened by `relabel_temperature`; classes come out uneven then, unless `keep_balance`
    draws until each has its number. `placement` moves classes to their released means in the directions that tell
    them apart. `unit_rows` gives the noise of a row what its mean leaves of unit length, where embeddings lie on the
    sphere. `prototype_share` of the rows are their class's prototype without noise, and `prototype_spread` of those
    lie around it as the latent spreads the class. `mixing` is the weight of a site's own head; `head_scale` flattens
    the published one before they are mixed, since noise in training makes it overconfident.
    """

    synthetic_rows: int = Field(20_000, ge=1, le=10_000_000)
    num_codes: int = Field(1, ge=1, le=64)
    mixture: Literal["samples", "parameters"] = "samples"
    latent_law: Literal["prior", "standard"] = "prior"
    balance: Literal["uniform", "dp-counts"] = "uniform"
    keep_balance: bool = False
    relabel: Literal["none", "likeliest", "drawn"] = "likeliest"
    relabel_temperature: float = Field(1.0, gt=0.0)
    placement: bool = True
    unit_rows: bool = False
    prototype_share: float = Field(0.0, ge=0.0, le=1.0)
    prototype_spread: float = Field(0.0, ge=0.0, le=1.0)
    covariance_weight: float = Field(0.0, ge=0.0)
    meta_steps: int = Field(200, ge=0)
    mixing: float = Field(0.5, ge=0.0, le=1.0)
    head_scale: float = Field(0.35, gt=0.0)
