"""Encoders of every family as tiny random models: functions of the picture, with all weights, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.features import tokens_before_patches
from embeddings.encoders.load import load_encoder

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def _save(folder: Path, model: Any, **changes: Any) -> Path:
    """A model's folder with a processor of 32x32 pixels."""
    model.save_pretrained(folder)
    settings: dict[str, Any] = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | changes))
    return folder


def _models() -> dict[str, tuple[Callable[[], Any], int | None]]:
    """How each family is made, and how many tokens stand before its patches; None where there are no tokens."""
    import transformers as hf

    vit = {**SMALL, "image_size": 32, "intermediate_size": 64}
    clip = {**vit, "projection_dim": 16}
    return {
        "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL, image_size=32)), 1),
        "dinov2 with registers": (
            lambda: hf.Dinov2WithRegistersModel(
                hf.Dinov2WithRegistersConfig(**SMALL, image_size=32, num_register_tokens=4)
            ),
            5,
        ),
        "dinov3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**vit, num_register_tokens=4)), 5),
        "dinov3 convnext": (
            lambda: hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1])),
            1,
        ),
        "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**vit)), 0),
        "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**clip)), 1),
        "vit": (lambda: hf.ViTModel(hf.ViTConfig(**vit), add_pooling_layer=False), 1),
        "swin": (
            lambda: hf.SwinModel(
                hf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
            ),
            0,
        ),
    }


@pytest.mark.parametrize("family", _models())
def test_load_counts_the_tokens_of_every_family(tmp_path: Path, family: str, rng: np.random.Generator) -> None:
    """`mean-patch` against the mean of the last hidden state without the tokens that are no patches."""
    make, before = _models()[family]
    torch.manual_seed(0)
    model = make().eval()
    encoder = load_encoder(str(_save(tmp_path / "m", model)), EncoderOptions(pooling="mean-patch", device="cpu"))
    images = [rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(3)]
    prepared = np.stack([encoder.prepare.numbers(image) for image in images])
    with torch.inference_mode():
        hidden = model(pixel_values=torch.from_numpy(prepared)).last_hidden_state
    wanted = hidden[:, before:].mean(dim=1).numpy()
    np.testing.assert_allclose(encoder.embed(images), wanted, rtol=1e-4, atol=1e-5)
    again = load_encoder(str(tmp_path / "m"), EncoderOptions(pooling="mean-patch", device="cpu"))
    np.testing.assert_array_equal(again.embed(images), encoder.embed(images))
    assert again.weights_digest == encoder.weights_digest


def _change(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "all keys renamed": (lambda keys: {f"module.backbone.{key}": one for key, one in keys.items()}, "embeddings"),
    "a layer is missing": (lambda keys: {key: one for key, one in keys.items() if "layer.1." not in key}, "layer.1."),
    "the last norm is missing": (
        lambda keys: {key: one for key, one in keys.items() if not key.startswith("layernorm")},
        "layernorm",
    ),
    "another width": (
        lambda keys: {key: one[:-1].clone() if key == "layernorm.weight" else one for key, one in keys.items()},
        "layernorm.weight",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_load_refuses_weights_that_would_be_random(tmp_path: Path, change: str) -> None:
    folder = _save(tmp_path / "m", _models()["dinov2"][0]())
    _change(folder, CHANGES[change][0])
    with pytest.raises(ConfigError, match=rf"the features depend on, found.*{CHANGES[change][1]}") as caught:
        load_encoder(str(folder), EncoderOptions(device="cpu"))
    assert "\n" not in str(caught.value)


def test_load_leaves_a_pooler_that_was_never_trained_out_of_the_digest(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """A classifier's checkpoint: the library adds a pooler of random weights that no embedding depends on."""
    import transformers as hf

    config = hf.ViTConfig(**SMALL, image_size=32, intermediate_size=64, num_labels=4)
    model = hf.ViTForImageClassification(config).eval()
    folder = _save(tmp_path / "m", model)
    encoders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        encoders.append(load_encoder(str(folder), EncoderOptions(device="cpu")))
    first, second = encoders
    assert (first.weights_digest, first.revision) == (second.weights_digest, second.revision)
    images = [rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)]
    with torch.inference_mode():
        pixels = torch.from_numpy(first.prepare.numbers(images[0])[None])
        wanted = model.vit(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(first.embed(images), wanted.numpy(), rtol=1e-4, atol=1e-5)
    _change(folder, lambda keys: {key: one + (0.01 if key == "vit.layernorm.bias" else 0) for key, one in keys.items()})
    assert load_encoder(str(folder), EncoderOptions(device="cpu")).weights_digest != first.weights_digest


def test_load_refuses_a_processor_of_ragged_pictures(tmp_path: Path) -> None:
    folder = _save(tmp_path / "m", _models()["dinov2"][0](), do_center_crop=False)
    with pytest.raises(ConfigError, match=r"pictures of different sizes.*set do_center_crop and crop_size"):
        load_encoder(str(folder), EncoderOptions(device="cpu"))


@pytest.mark.parametrize(
    ("named", "tokens", "sides", "patch", "wanted"),
    [
        (1, 17, (32, 32), 8, 1),
        (5, 21, (32, 32), 8, 5),
        (1, 21, (32, 32), 8, None),  # registers that no setting tells of
        (0, 16, (32, 32), 8, 0),
        (0, 50, (224, 224), None, 1),  # a pooled token before the grid
        (0, 49, (224, 224), 4, 0),  # a hierarchy ends with larger patches
        (0, 17, (32, 32), 8, None),  # one token too many, and none of them pooled
        (1, 33, (32, 64), 8, 1),
        (1, 34, (32, 64), 8, None),
        (1, 10, (30, 30), 8, 1),  # an edge that is no whole patch is left out
        (0, 16, (30, 30), 4, 0),  # or filled up
        (1, 9, (32, 64), (8, 16), None),
        (1, 17, (32, 64), (8, 16), 1),
    ],
)
def test_tokens_before_the_patches_leave_a_grid(
    named: int, tokens: int, sides: tuple[int, int], patch: object, wanted: int | None
) -> None:
    network = torch.nn.Module()
    network.config = SimpleNamespace(patch_size=patch, num_register_tokens=max(named - 1, 0))
    if named:
        network.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 8))
    used = network.state_dict()
    if wanted is None:
        with pytest.raises(ConfigError, match=rf"expected {named} tokens before.* found {tokens} tokens"):
            tokens_before_patches("x", network, used, (1, tokens, 8), sides, "mean-patch", False)
    else:
        pooled = named < wanted
        assert tokens_before_patches("x", network, used, (1, tokens, 8), sides, "mean-patch", pooled) == wanted
