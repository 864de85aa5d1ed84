"""What an encoder is, and how one is asked for; nothing heavy is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from common.wire.identity import EncoderIdentity

Precision = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["cls", "mean-patch", "both"]
OFFLINE_ENCODER = "efficientnet-lite0"


class Encoder(Protocol):
    """A frozen image encoder.

    `name`, `revision`, `dimension` (width d), `preprocessing` (a description), `weights_digest` (SHA-256) and
    `precision` identify it; two encoders equal in these give the same vector for the same image. `former_digest`
    stood for `weights_digest` before unused weights were left out of it, empty where some were random. `device`
    is where it runs (`cpu`, `cuda`), `batch_size` the number of images it runs at once; `remark` is what users should
    know of it, or empty.
    """

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def preprocessing(self) -> str: ...
    @property
    def weights_digest(self) -> str: ...
    @property
    def former_digest(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def remark(self) -> str: ...

    @property
    def prepare(self) -> Callable[[NDArray[np.uint8]], NDArray[Any]]:
        """Turns one decoded image, (h, w) or (h, w, 3) uint8, into the network's input; pickled without the network."""
        ...

    def forward(self, prepared: Any) -> NDArray[np.float32]:
        """Run the network on stacked inputs (b, ...), an array or a tensor; returns (b, d) float32. Thread-safe."""
        ...

    def embed(self, batch: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed decoded images, each (h, w) or (h, w, 3) uint8; returns (n, d) float32."""
        ...


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
    """How to make an encoder; what does not apply to the named one is refused."""

    revision: str | None = None
    pooling: Pooling = "cls"
    precision: Precision = "float32"
    device: str = "cpu"
    cache_dir: Path | None = None
    offline: bool = False
    compile: bool = False
    batch_size: int | None = None


def precision_advice() -> list[str]:
    """Which arithmetic this machine's GPU is fast in, in a line; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return []
    fast = fast_precision(torch.cuda.get_device_capability())
    if fast == "float32":
        return []
    return [
        f"GPU {torch.cuda.get_device_name()}: fedhypevae embed --precision {fast} is several times as fast as float32 "
        "in it; all sites must agree on one"
    ]


def fast_precision(capability: tuple[int, int]) -> Precision:
    """Which arithmetic a card of a compute capability is fastest in.

    Source: NVIDIA, CUDA C++ Programming Guide: tensor cores take float16 from 7.0, bfloat16 from 8.0.
    """
    return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"


def identity_of(encoder: Encoder, class_names: Sequence[str]) -> EncoderIdentity:
    """Return what sites compare: the encoder's identity with the class list."""
    return EncoderIdentity(
        encoder=encoder.name,
        revision=encoder.revision,
        dimension=encoder.dimension,
        preprocessing=encoder.preprocessing,
        weights_digest=encoder.weights_digest,
        precision=encoder.precision,
        class_names=tuple(class_names),
    )


def former_identity(encoder: Encoder, identity: EncoderIdentity) -> EncoderIdentity:
    """Return an encoder's identity as it was before weights that no feature depends on were left out of the digest."""
    by_digest = identity.revision == encoder.weights_digest[:16]  # that of a local folder
    revision = encoder.former_digest[:16] if by_digest else identity.revision
    return dataclasses.replace(identity, revision=revision, weights_digest=encoder.former_digest)
