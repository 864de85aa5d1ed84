"""Settings of the generator: its sizes, its training, and what the server does with it afterwards."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from common.config.base import Concern, NoneOrSome, Positive, Text, Weight

MOST_LAYERS = 6
MMD_FEATURES = 64
"""Random Fourier features of the released MMD: more of them are more noise, and its term gains nothing either way."""
MMD_BANDWIDTHS = (0.5, 1.0, 2.0)
"""Of the Gaussian kernels, in units of an embedding's length: about the distances between unit vectors."""


class ModelConfig(Concern):
    """Sizes of the generator. `hidden_widths` is a comma-separated list; empty means a linear decoder.

    `residual_energy` is the share of a unit-norm embedding's squared length that the observation noise carries: the
    decoder's variance is residual_energy / d_x in every coordinate, a public constant.
    """

    latent_dim: int = Field(4, ge=0, le=512)
    code_dim: int = Field(2, ge=0, le=512)
    hidden_widths: Text = ""
    trunk_width: int = Field(0, ge=0, le=1024)
    prior_width: int = Field(8, ge=1, le=1024)
    label_embedding_dim: int = Field(4, ge=1, le=512)
    encoder_width: int = Field(64, ge=1, le=4096)
    residual_energy: Positive = 0.67

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
        if len(widths) > MOST_LAYERS or any(not 1 <= width <= 8192 for width in widths):
            raise ValueError(f"hidden-widths must be at most {MOST_LAYERS} numbers between 1 and 8192")
        if widths and self.latent_dim == 0:
            raise ValueError("hidden-widths need a latent: set latent-dim above 0, or leave hidden-widths empty")
        return self


class TrainingConfig(Concern):
    """The optimisation. Rates act on sums divided by (clip norm x sampling rate x released total).

    Every embedding is scaled to unit length where records are loaded (a public map of one record), and the released
    mean is subtracted; `feature_norm` clips what is left.

    `score_noise` bounds the rates by what noise alone does: the standard deviation that it gives a class score of a
    record of norm `feature_norm` by the last round, from public and released numbers; 0 leaves the rates as they are.
    `logit_adjustment` is the weight of the released class shares' logarithm in the discriminative term: with 1 the
    classes' scores hold for classes of equal size, as the synthetic set has them, however rare a class is at the sites.
    """

    num_rounds: int = Field(100, ge=0, le=100_000)
    local_steps: int = Field(1, ge=1, le=1000)
    learning_rate: Positive = 16.0
    generator_rate: Weight = 0.04
    code_rate: Weight = 0.05
    momentum: NoneOrSome = Field(0.8, ge=0.0, le=0.9999)
    averaging_fraction: NoneOrSome = Field(0.35, ge=0.0, le=1.0)
    feature_norm: float = Field(0.7, ge=1e-3, le=1e4)
    class_bias_scale: float = Field(0.117, ge=1e-3, le=1e3)
    score_noise: Weight = 1.8
    discriminative_weight: Weight = 1.0
    logit_adjustment: NoneOrSome = Field(1.0, ge=0.0, le=2.0)
    elbo_weight: Weight = 0.05
    code_penalty: Weight = 1e-3
    code_radius: float = Field(0.1, ge=1e-3, le=1e4)
    lipschitz_bound: Positive = 1.0
    lipschitz_penalty: Weight = 0.0
    mmd: Literal["off", "released", "per-example"] = "off"
    mmd_weight: Positive = 0.03  # as large as a clipped gradient; at 1 it drowns all else
    sleep_steps: int = Field(5, ge=0, le=1000)
    encoder_rate: Positive = 2e-3

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.discriminative_weight == 0 and self.elbo_weight == 0:
            raise ValueError("discriminative-weight and elbo-weight are both 0: nothing would be trained")
        return self


class SynthesisConfig(Concern):
    """What the server does after training: free, since it touches released values alone.

    Each synthetic row has the class that the generator's own posterior finds likeliest there, so that classes come out
    uneven. `prototypes` fills rows up to unit length with noise and makes a few of them their class's prototype
    without noise (`common.generator.rows`), for heads that compare distances.
    """

    synthetic_rows: int = Field(50_000, ge=1, le=10_000_000)
    num_codes: int = Field(1, ge=1, le=64)
    printed_rows: bool = False
    balance: Literal["uniform", "dp-counts"] = "uniform"
    prototypes: bool = True
    covariance_weight: Weight = 0.0
    meta_steps: int = Field(200, ge=0, le=100_000)
