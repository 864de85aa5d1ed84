"""Settings of the methods that FedHypeVAE is compared with.

They stand here and not beside their methods: a run is parsed and saved as a whole, at sites as well, and
`common/config` lies below the methods, so that it can ask none of them for its fields.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from common.config.base import Concern, NoneOrSome, Positive, Text, Weight
from common.config.generator import MOST_LAYERS


class RivalsConfig(Concern):
    """What FedAvg and its kin, DP-CVAE, DP-CGAN and MH-pFedHN need beside the common settings.

    `local_*` is the SGD that a site runs on its records in the methods that average or pull back models; `local_decay`
    is the weight decay. `architectures` are the sites' own models, comma-separated and handed out in turn: `linear`, or
    `mlp-` and the widths of its hidden layers. `chunk_size` is the number of parameters that one embedding of
    MH-pFedHN generates; `teacher_*` belong to its distillation. `own_encoders` lets sites with different encoders, and
    so different widths of embeddings, meet: no other method can serve them.
    """

    local_epochs: int = Field(1, ge=1, le=1000)
    local_batch_size: int = Field(64, ge=1, le=1_000_000)
    local_rate: Positive = 0.01
    local_momentum: NoneOrSome = Field(0.9, ge=0.0, le=0.9999)
    local_decay: Weight = 3e-3
    prox_mu: Weight = 0.01
    adam_rate: Positive = 1e-3
    cvae_width: int = Field(256, ge=1, le=8192)
    gan_width: int = Field(512, ge=1, le=8192)
    noise_dim: int = Field(100, ge=1, le=4096)
    architectures: Text = "linear,mlp-16,mlp-32,mlp-32-16"
    chunk_size: int = Field(3072, ge=1, le=10_000_000)
    chunk_embedding_dim: int = Field(64, ge=1, le=4096)
    body_width: int = Field(128, ge=1, le=8192)
    hyper_rate: Positive = 2e-4
    hyper_gradient_norm: Positive = 50.0
    teacher_weight: NoneOrSome = Field(0.2, ge=0.0, le=1.0)
    teacher_temperature: Positive = 15.0
    own_encoders: bool = False

    @property
    def hidden_widths_of(self) -> tuple[tuple[int, ...], ...]:
        """Widths of the hidden layers of every architecture; none for a linear one."""
        return tuple(_parse(name.strip()) for name in self.architectures.split(","))

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.hidden_widths_of
        return self


def _parse(name: str) -> tuple[int, ...]:
    if name == "linear":
        return ()
    widths = name.removeprefix("mlp-").split("-")
    fits = all(width.isdecimal() and 1 <= int(width) <= 8192 for width in widths) and len(widths) <= MOST_LAYERS
    if not name.startswith("mlp-") or not fits:
        raise ValueError(f"architectures must be linear or mlp-WIDTH-..., such as linear,mlp-32-16, found {name!r:.80}")
    return tuple(int(width) for width in widths)
