"""One image through the encoder that a classifier names: the same weights and preprocessing, or a refusal."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.wire.identity import EncoderIdentity, compare
from embeddings.encoders.base import Encoder, EncoderOptions, Pooling, Precision, former_identity, identity_of
from embeddings.encoders.load import load_encoder
from embeddings.readers.dicom import is_dicom, read_frame
from embeddings.readers.dicom_picture import Window
from embeddings.readers.images import read_image

_RENDERING = re.compile(r"dicom window ([-+.\deE]+),([-+.\deE]+); ")
_POOLING = re.compile(r"; pooling (cls|mean-patch|both)$")


def encoder_of(identity: EncoderIdentity, source: str | None, options: EncoderOptions) -> Encoder:
    """The encoder of an identity, its weights loaded and compared.

    Args:
        identity: what the classifier was trained for.
        source: another name or a folder to load it from; default: the identity's own name.
        options: device, cache and whether the network may be used; the rest follows from the identity.

    Raises:
        ConfigError: it can't be loaded. DataError: what was loaded is another encoder; the text names the difference.
    """
    pooling = _POOLING.search(identity.preprocessing)
    local = source is not None and Path(source).is_dir()
    chosen = dataclasses.replace(
        options,
        revision=None if local else identity.revision,
        pooling=_pooling(pooling[1] if pooling else "cls"),
        precision=_precision(identity.precision),
    )
    encoder = load_encoder(identity.encoder if source is None else source, chosen)
    wanted = dataclasses.replace(identity, preprocessing=_RENDERING.sub("", identity.preprocessing))
    found = dataclasses.replace(identity_of(encoder, identity.class_names), encoder=identity.encoder)
    if wanted.weights_digest == encoder.former_digest:
        found = former_identity(encoder, found)
    if local:
        found = dataclasses.replace(found, revision=identity.revision)  # the weights' digest tells more
    wrong = compare({"classifier": wanted, "encoder": found})
    if wrong:
        raise DataError(
            f"the encoder is not the one that the classifier was trained for: {wrong[0].field} is {wrong[0].found}, "
            f"expected {wrong[0].expected}"
        )
    return encoder


def read_any(path: Path, identity: EncoderIdentity, frame: int = 0) -> NDArray[np.uint8]:
    """The pixels of an image or DICOM file, shown as at the embedding of the training data.

    Raises:
        DataError: the file is missing, no image, or damaged.
    """
    if not path.is_file():
        raise DataError(f"no image at {path}")
    if not is_dicom(path):
        return read_image(path, path.name)
    rendering = _RENDERING.search(identity.preprocessing)
    window = None if rendering is None else Window(float(rendering[1]), float(rendering[2]))
    return read_frame(path, path.name, frame, window)


def _pooling(word: str) -> Pooling:
    known: dict[str, Pooling] = {"cls": "cls", "mean-patch": "mean-patch", "both": "both"}
    return known[word]


def _precision(word: str) -> Precision:
    known: dict[str, Precision] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    if word not in known:
        raise DataError(f"the classifier's encoder has an unknown precision {word!r}")
    return known[word]
