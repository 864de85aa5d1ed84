"""Vision backbones of `transformers` and `timm`: DINOv2 with and without registers, or any other by name.

The preprocessing is the model's own `AutoImageProcessor`, on the PIL backend: another backend resizes with
other rounding, and two sites would no longer get the same vector for the same image. At loading an encoder is
held to be a function of the picture: the same row each time, alone and in a batch, whatever the picture's shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.devices import bytes_of, rows_that_fit
from common.errors import ConfigError
from embeddings.canary import draw
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.features import (
    check_loaded,
    named_tokens,
    parameters_used,
    state_digest,
    tokens_before_patches,
)
from embeddings.encoders.preparation import Preparation, as_numbers, on_device

_SIZES = ("small", "base", "large", "giant")
SHORT_NAMES = {
    f"dinov2-{size}{suffix}": f"facebook/dinov2-{'with-registers-' if suffix else ''}{size}"
    for size in _SIZES
    for suffix in ("", "-registers")
}
_COMMIT = re.compile("[0-9a-f]{40}")  # a branch or tag may move: two sites would get different weights
_NEEDS_TIMM = re.compile(r"(?i)(timm|torchvision)['\"]? library|(dependencies:|No module named).*(timm|torchvision)")
_BATCH = {"cpu": 8, "cuda": 128}  # as many images at once as make it faster, where they fit
_BYTES_PER_INPUT_BYTE = 64  # activations of one image on the processor, by the size of its pixels
_SLOWER = "the encoder's processor gives no bytes: pictures travel to the GPU in its own numbers, which is slower"
_TRIAL_SHAPES = ((64, 64, 3), (64, 128, 3), (128, 64, 3))
# Of a row's length: rows so near each other have a cosine of at least 0.99999 in float32.
_LARGEST_STEP = {"float32": 4e-3, "float16": 4e-2, "bfloat16": 0.14}


@dataclasses.dataclass(frozen=True, eq=False)
class TransformersEncoder:
    """A backbone with its processor. `pooling` chooses the class token, the mean patch token, or both."""

    network: Any
    prepare: Preparation
    name: str
    revision: str
    dimension: int
    preprocessing: str
    weights_digest: str
    former_digest: str
    precision: str
    pooling: str
    prefix_tokens: int
    device: str
    batch_size: int
    table: Any = None  # of `prepare`, where the network is
    remark: str = ""

    @staticmethod
    def load(name: str, options: EncoderOptions) -> TransformersEncoder:
        """Load a backbone from the hub at a pinned revision, from a local folder, or from an offline cache.

        Args:
            name: short name, hub name or folder.
            options: a hub name needs `revision` (a commit); `offline` forbids the network.

        Returns:
            The encoder, in evaluation mode, its parameters frozen.

        Raises:
            ConfigError: no revision for a hub name; the model can't be had or is no vision backbone; a weight
                of its features is missing; the pooling does not fit it; it is no function of the picture.
        """
        local = Path(name).is_dir()
        source = name if local else SHORT_NAMES.get(name, name)
        if not local and (options.revision is None or not _COMMIT.fullmatch(options.revision)):
            raise ConfigError(
                f"encoder {name}: expected a pinned revision (--revision with the 40 digits of a commit of "
                f"huggingface.co/{source}), or a local folder; else two sites may get different weights"
            )
        shared: dict[str, Any] = {"local_files_only": options.offline or local}
        if not local:
            shared |= {"revision": options.revision, "cache_dir": options.cache_dir}
        try:
            import torch
            from transformers import AutoImageProcessor, AutoModel

            with _quiet():
                whole, info = AutoModel.from_pretrained(
                    source,
                    trust_remote_code=False,
                    dtype=getattr(torch, options.precision),
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are in `info`, and refused where a feature depends on them
                    **shared,
                )
                processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, backend="pil", **shared)
        except Exception as error:  # a foreign library over a foreign file: it may raise anything
            extra = "; run: pip install '.[timm]' in the project's folder" if _NEEDS_TIMM.search(str(error)) else ""
            raise ConfigError(
                f"encoder {name}: the model can't be loaded ({_first_line(error)}); check the name and "
                "revision and the access to the hub, or download it once and give its folder" + extra
            ) from None
        try:
            return _made(name, source, local, options, whole, info, processor)
        except (ConfigError, MemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"encoder {name}: the model can't embed a picture ({_first_line(error)}); choose a vision backbone "
                "whose processor gives pixel_values alone"
            ) from None

    def forward(self, prepared: Any) -> NDArray[np.float32]:
        """Run the backbone on what `prepare` gives, (b, 3, s, s), an array or a tensor; returns (b, d) float32."""
        import torch

        with torch.inference_mode():
            features = self._pool(self.output(prepared).last_hidden_state, prepared.shape[2:])
        result: NDArray[np.float32] = features.float().cpu().numpy()
        return result

    def output(self, prepared: Any) -> Any:
        """Return what the backbone makes of (b, 3, s, s): tensors by name, among them `last_hidden_state`."""
        import torch

        pixels = as_numbers(on_device(prepared, self.device), self.table)
        return self.network(pixel_values=pixels.to(getattr(torch, self.precision)))

    def _pool(self, hidden: Any, size: tuple[int, ...]) -> Any:
        import torch

        if hidden.ndim == 4:  # a convolutional backbone: (b, channels, h, w), or (b, h, w, channels) of a windowed one
            # A map's sides are to each other as its input's; the number of channels may equal one of them.
            (height, width), (first, second, third) = size, hidden.shape[1:]
            last = abs(first * width - second * height) < abs(second * width - third * height)
            last |= getattr(getattr(self.network, "timm_model", None), "output_fmt", "NCHW") == "NHWC"
            return hidden.mean(dim=(1, 2) if last else (2, 3))
        token, patches = hidden[:, 0], hidden[:, self.prefix_tokens :].mean(dim=1)
        if self.pooling == "cls":
            return token
        return patches if self.pooling == "mean-patch" else torch.cat([token, patches], dim=1)

    def embed(self, batch: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed decoded images; returns (n, d) float32."""
        return self.forward(np.stack([self.prepare(image) for image in batch]))


def _made(
    name: str, source: str, local: bool, options: EncoderOptions, whole: Any, info: dict[str, Any], processor: Any
) -> TransformersEncoder:
    """Make an encoder of a loaded model, and try it."""
    import torch

    # Of a model of images and texts (CLIP, SigLIP) the images' half.
    network = getattr(whole, "vision_model", whole).to(options.device).eval().requires_grad_(True)
    prepare = Preparation(processor)
    description = prepare.describe()
    if network.config.model_type == "vit_mae":
        network.embeddings.random_masking = _keep_all
        description += "; nothing masked"
    former = state_digest(network.state_dict())
    encoder = TransformersEncoder(
        network=network,
        prepare=prepare,
        name=_public_name(network, source, local),
        revision="",
        dimension=0,
        preprocessing="",
        weights_digest="",
        former_digest="",
        precision=options.precision,
        pooling=options.pooling,
        prefix_tokens=0,
        device=options.device,
        batch_size=1,
    )
    rng = np.random.default_rng(2026)
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in _TRIAL_SHAPES]
    shapes = {prepare(picture).shape for picture in pictures}
    if len(shapes) > 1:
        raise ConfigError(
            f"encoder {name}: its processor gives pictures of different sizes ({', '.join(map(str, sorted(shapes)))}); "
            "set do_center_crop and crop_size in its preprocessor_config.json"
        )
    trial = prepare(pictures[0])[None]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):  # the graph alone
        output = encoder.output(trial)
    hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
    pooled_first = pooled is not None and hidden.ndim == 3 and torch.equal(pooled, hidden[:, 0])
    used = parameters_used(network, hidden)
    was_random = check_loaded(name, whole, info, used, network)
    network.requires_grad_(False)
    prefix = tokens_before_patches(name, network, used, hidden.shape, trial.shape[2:], options.pooling, pooled_first)
    # Once counted otherwise: other rows.
    if options.pooling != "cls" and hidden.ndim == 3 and prefix != named_tokens(network):
        description += f"; {prefix} tokens before the patches"
    digest = state_digest({key: value for key, value in network.state_dict().items() if key in used})
    prepare = dataclasses.replace(prepare, shape=trial.shape[1:]).in_bytes([*pictures, draw()])
    encoder = dataclasses.replace(
        encoder,
        revision=digest[:16] if options.revision is None else options.revision,
        preprocessing=f"{description}; pooling {options.pooling}",
        weights_digest=digest,
        former_digest="" if was_random else former,
        prefix_tokens=prefix,
        prepare=prepare,
        table=None if prepare.table is None else torch.from_numpy(prepare.table).to(options.device),
        remark=_SLOWER if prepare.table is None and options.device != "cpu" else "",
    )
    alone, together = np.concatenate([encoder.embed([picture]) for picture in pictures]), encoder.embed(pictures)
    if not np.isfinite([alone, together]).all() or (alone == alone[0]).all():
        raise ConfigError(
            f"encoder {name}: expected rows of finite numbers that differ between pictures, found others; check its "
            "weights, the precision, and image_mean, image_std and rescale_factor in its preprocessor_config.json"
        )
    step, length = np.linalg.norm(alone - together, axis=1), np.linalg.norm(together, axis=1)
    if not (step <= _LARGEST_STEP[options.precision] * length).all():
        raise ConfigError(
            f"encoder {name}: expected the same row for the same picture, alone and in a batch; found rows that differ "
            f"by {step.max():.2g}, of length {length.max():.2g}: it is no function of the picture, and can't be used"
        )
    return _sized(encoder, options, trial)


def _sized(encoder: TransformersEncoder, options: EncoderOptions, trial: NDArray[Any]) -> TransformersEncoder:
    """Choose the batch, and compile the network for it where asked to."""
    import torch

    size = options.batch_size
    if options.compile:
        encoder = dataclasses.replace(encoder, network=torch.compile(encoder.network))
    if size is None:
        device = torch.device(options.device)
        encoder.forward(trial)  # the first image also loads kernels; the second tells what each one takes
        taken = bytes_of(device, lambda: encoder.forward(trial), _BYTES_PER_INPUT_BYTE * float(trial.nbytes))
        taken *= 2 if device.type == "cuda" else 1  # the pipeline runs two batches
        size = rows_that_fit(device, taken, _BATCH.get(device.type, 128))
    # A compiled network is compiled here, for the batch it will get, before several threads call it.
    trial = np.repeat(trial, size if options.compile else 1, axis=0)
    return dataclasses.replace(encoder, batch_size=size, dimension=int(encoder.forward(trial).shape[1]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's table of weights from the terminal: what matters of it is said in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _keep_all(sequence: Any, noise: Any = None) -> tuple[Any, None, None]:
    """Leave all patches in, in their order, in place of a masked autoencoder's random choice."""
    return sequence, None, None


def _public_name(network: Any, source: str, local: bool) -> str:
    """Name a local folder by its architecture: a path would differ between sites, and tell about them."""
    return f"local:{network.config.model_type}" if local else source


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
