"""Tiny models of random weights in folders, as `save_pretrained` leaves them, one of each kind that sites use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_SMALL = {**_SIZES, "intermediate_size": 64}
_TEXTS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 40},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
# family -> (configuration's class, model's class, settings)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Config", "Dinov2Model", _SIZES),
    "dinov2-registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", _SIZES),
    "dinov3-vit": ("DINOv3ViTConfig", "DINOv3ViTModel", {**_SMALL, "num_register_tokens": 3}),
    "dinov3-convnext": (
        "DINOv3ConvNextConfig",
        "DINOv3ConvNextModel",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64, "layer_scale_init_value": 0.5},
    ),
    "siglip": (
        "SiglipConfig",
        "SiglipModel",
        {"vision_config": _SMALL, "text_config": {**_TEXTS, "vocab_size": 50}},
    ),
    "clip": ("CLIPConfig", "CLIPModel", {"vision_config": _SMALL, "text_config": {**_TEXTS, "vocab_size": 50}}),
    "vit-mae": (
        "ViTMAEConfig",
        "ViTMAEForPreTraining",
        {
            **_SMALL,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
    ),
    "swin": (
        "SwinConfig",
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    ),
    "vit-classifier": ("ViTConfig", "ViTForImageClassification", {**_SMALL, "num_labels": 4}),
    "resnet": (
        "ResNetConfig",
        "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "beit": ("BeitConfig", "BeitModel", _SMALL),
    "deit": ("DeiTConfig", "DeiTModel", _SMALL),
}
_CROP = {"dinov3-convnext": 64}


def save_model(folder: Path, family: str, **processor: Any) -> Path:
    """Save a model of a family with its processor; returns the folder."""
    config, model, settings = FAMILIES[family]
    torch.manual_seed(0)
    network = getattr(transformers, model)(getattr(transformers, config)(**settings))
    with torch.no_grad():  # what begins as zeros or ones shows no mistake
        for value in network.parameters():
            value.add_(0.05 * torch.randn(value.shape))
    network.save_pretrained(folder)
    side = _CROP.get(family, 32)
    settings = _PROCESSOR | {"size": {"shortest_edge": side + 8}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | processor))
    return folder


def save_timm(folder: Path, architecture: str, *, plain: bool = False, **arguments: Any) -> Path:
    """Save a timm model; `plain` as timm's own hub does: keys and settings without those of `transformers`."""
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(
        architecture=architecture, model_args=arguments, num_classes=0, do_pooling=False
    )
    network = transformers.TimmWrapperModel(config)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.05 * torch.randn(value.shape))
    network.save_pretrained(folder)
    preprocessing = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    preprocessing |= {"crop_pct": 0.8, "crop_mode": "center"}
    written = json.loads((folder / "config.json").read_text())
    if plain:
        kept = ("architecture", "model_args", "num_classes")
        written = {key: written[key] for key in kept if key in written}
        change_weights(folder, lambda weights: {key.removeprefix("timm_model."): weights[key] for key in weights})
    (folder / "config.json").write_text(json.dumps(written | {"pretrained_cfg": preprocessing}))
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace a folder's weights by a function of them."""
    path = folder / "model.safetensors"
    changed = {key: value.contiguous() for key, value in change(load_file(path)).items()}
    save_file(changed, path, metadata={"format": "pt"})


def change_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
