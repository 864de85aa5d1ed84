"""Vision backbones of `transformers`: DINOv2 with and without registers, or any other by name.

The preprocessing is the model's own `AutoImageProcessor`, on the PIL backend: another backend resizes with
other rounding, and two sites would no longer get the same vector for the same image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.devices import bytes_of, rows_that_fit
from common.errors import ConfigError
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.checks import check_rows, prefix_tokens, prepared_trial, unused_weights

_SIZES = ("small", "base", "large", "giant")
SHORT_NAMES = {
    f"dinov2-{size}{suffix}": f"facebook/dinov2-{'with-registers-' if suffix else ''}{size}"
    for size in _SIZES
    for suffix in ("", "-registers")
}
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
_COMMIT = re.compile("[0-9a-f]{40}")  # a branch or tag may move: two sites would get different weights
_BATCH = {"cpu": 8, "cuda": 128}  # as many images at once as make it faster, where they fit
_BYTES_PER_INPUT_BYTE = 64  # activations of one image on the processor, by the size of its pixels


@dataclasses.dataclass(frozen=True, eq=False)
class TransformersEncoder:
    """A backbone with its processor. `pooling` chooses the class token, the mean patch token, or both."""

    network: Any
    processor: Any
    name: str
    revision: str
    dimension: int
    preprocessing: str
    weights_digest: str
    precision: str
    pooling: str
    class_token: bool
    prefix_tokens: int
    device: str
    batch_size: int

    @staticmethod
    def load(name: str, options: EncoderOptions) -> TransformersEncoder:
        """Load a backbone from the hub at a pinned revision, from a local folder, or from an offline cache.

        Args:
            name: short name, hub name or folder.
            options: a hub name needs `revision` (a commit); `offline` forbids the network.

        Returns:
            The encoder, in evaluation mode, its parameters frozen.

        Raises:
            ConfigError: no revision for a hub name; the model can't be had or is no vision backbone; the
                pooling does not fit it.
        """
        import torch
        from transformers import AutoImageProcessor, AutoModel

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
            whole, told = AutoModel.from_pretrained(
                source,
                trust_remote_code=False,
                dtype=getattr(torch, options.precision),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told, and judged like missing ones
                **shared,
            )
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, backend="pil", **shared)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(
                f"encoder {name}: the model can't be loaded ({_first_line(error)}); check the name and "
                f"revision and "
                "the access to the hub, or download it once and give its folder"
            ) from None
        # Of a model of images and texts (CLIP, SigLIP) the images' half.
        whole = whole.to(options.device).eval().requires_grad_(False)
        network = getattr(whole, "vision_model", whole)
        state = network.state_dict()
        encoder = TransformersEncoder(
            network=network,
            processor=processor,
            name=_public_name(network, source, local),
            revision=options.revision or "",
            dimension=0,
            preprocessing=_describe(processor, options.pooling),
            weights_digest="",
            precision=options.precision,
            pooling=options.pooling,
            class_token=any(mark in key for key in state for mark in _CLASS_TOKENS),
            prefix_tokens=_named_tokens(network.config, state),
            device=options.device,
            batch_size=1,
        )
        trials = prepared_trial(name, encoder.prepare)
        trial = trials[:1]
        output = encoder.output(trial)
        absent = {*told["missing_keys"], *(key if isinstance(key, str) else key[0] for key in told["mismatched_keys"])}
        unused = unused_weights(
            name, absent, whole.state_dict(), lambda: encoder.output(trial).last_hidden_state.float().cpu().numpy()
        )
        digest = _state_digest({key: tensor for key, tensor in state.items() if tensor.data_ptr() not in unused})
        encoder = dataclasses.replace(
            encoder,
            revision=options.revision or digest[:16],
            weights_digest=digest,
            prefix_tokens=encoder.tokens_before(output, trial.shape),
        )
        check_rows(name, options.precision, encoder.forward, trials)
        if options.compile:
            encoder = dataclasses.replace(encoder, network=torch.compile(network))
        size = options.batch_size
        if size is None:
            device = torch.device(options.device)
            encoder.forward(trial)  # the first image also loads kernels; the second tells what each one takes
            taken = bytes_of(device, lambda: encoder.forward(trial), _BYTES_PER_INPUT_BYTE * float(trial.nbytes))
            size = rows_that_fit(device, taken, _BATCH.get(device.type, 128))
        # A compiled network is compiled here, for the batch it will get, before several threads call it.
        trial = np.repeat(trial, size if options.compile else 1, axis=0)
        return dataclasses.replace(encoder, batch_size=size, dimension=int(encoder.forward(trial).shape[1]))

    def prepare(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Apply the model's processor to one image, (h, w) or (h, w, 3) uint8; returns (3, s, s) float32."""
        colour = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        values = self.processor(images=[colour], input_data_format="channels_last", return_tensors="np")
        result: NDArray[np.float32] = values["pixel_values"][0]
        return result

    def forward(self, prepared: NDArray[Any]) -> NDArray[np.float32]:
        """Run the backbone on (b, 3, s, s) float32; returns (b, d) float32."""
        import torch

        with torch.inference_mode():
            features = self._pool(self.output(prepared).last_hidden_state)
            result: NDArray[np.float32] = features.float().cpu().numpy()
        return result

    def output(self, prepared: NDArray[Any]) -> Any:
        """What the backbone itself gives for (b, 3, s, s) float32, on its device."""
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(np.ascontiguousarray(prepared))
            if self.device != "cpu":
                pixels = pixels.pin_memory()
            return self.network(pixel_values=pixels.to(self.device, getattr(torch, self.precision), non_blocking=True))

    def tokens_before(self, output: Any, input_shape: tuple[int, ...]) -> int:
        """How many tokens of an output stand before the patches; ConfigError where a mean of patches can't be told."""
        import torch

        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if hidden.ndim != 3:
            return self.prefix_tokens
        found = prefix_tokens(
            self.prefix_tokens,
            tuple(hidden.shape),
            (input_shape[2], input_shape[3]),
            getattr(self.network.config, "patch_size", None),
            pooled_first=pooled is not None and torch.equal(pooled, hidden[:, 0]),
        )
        if found is None and self.pooling != "cls":
            raise ConfigError(
                f"encoder {self.name}: {hidden.shape[1]} tokens can't be divided into special ones and patches; "
                "expected --pooling cls"
            )
        return self.prefix_tokens if found is None else found

    def _pool(self, hidden: Any) -> Any:
        import torch

        if self.pooling != "mean-patch" and not self.class_token:
            raise ConfigError(f"encoder {self.name}: it has no class token; expected --pooling mean-patch")
        if hidden.ndim == 4:  # a convolutional backbone: (b, channels, h, w)
            return hidden.mean(dim=(2, 3))
        token, patches = hidden[:, 0], hidden[:, self.prefix_tokens :].mean(dim=1)
        if self.pooling == "cls":
            return token
        return patches if self.pooling == "mean-patch" else torch.cat([token, patches], dim=1)

    def embed(self, batch: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Embed decoded images; returns (n, d) float32."""
        return self.forward(np.stack([self.prepare(image) for image in batch]))


def _named_tokens(config: Any, state: dict[str, Any]) -> int:
    """Count the tokens before the patches: class, distillation, registers."""
    marks = (*_CLASS_TOKENS, "distillation_token")
    tokens = sum(any(mark in key for key in state) for mark in marks)
    return tokens + int(getattr(config, "num_register_tokens", 0) or 0)


def _public_name(network: Any, source: str, local: bool) -> str:
    """Name a local folder by its architecture: a path would differ between sites, and tell about them."""
    return f"local:{network.config.model_type}" if local else source


def _describe(processor: Any, pooling: str) -> str:
    """Describe the preprocessing by the processor's settings, without those that name files or versions."""
    settings = processor.to_dict()
    kept = {
        key: value
        for key, value in settings.items()
        if key.startswith(("do_", "size", "crop_size", "image_", "resample", "rescale", "pad")) and value is not None
    }
    return f"pil {type(processor).__name__} {json.dumps(kept, sort_keys=True, default=str)}; pooling {pooling}"


def _state_digest(state: dict[str, Any]) -> str:
    """Return the SHA-256 over names, shapes and bytes of the parameters, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
