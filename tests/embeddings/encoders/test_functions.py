"""An encoder is a function of the picture, of weights that are its checkpoint's; or it is refused in one line.

The right values are those of the models' own forward pass, with the tokens before the patches counted by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from common.errors import ConfigError
from embeddings.encoders import backbones
from embeddings.encoders.base import Encoder, EncoderOptions, Pooling, identity_of
from embeddings.encoders.load import load_encoder
from tests.embeddings.encoders.tiny import FAMILIES, change_config, change_weights, copied, save_model, save_timm

PICTURES = ((40, 40, 3), (40, 90, 3), (90, 40), (7, 300, 3))
# Tokens before the patches, and whether the first stands for the whole picture.
TOKENS = {
    "dinov2": (1, True),
    "dinov2-registers": (1 + 4, True),
    "dinov3-vit": (1 + 3, True),
    "dinov3-convnext": (1, True),  # its pooled token
    "siglip": (0, False),
    "clip": (1, True),
    "vit-mae": (1, True),
    "swin": (0, False),
    "vit-classifier": (1, True),
    "beit": (1, True),
    "deit": (2, True),  # class and distillation
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_model(root / family, family)
    return root


def _pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in PICTURES]


def _with(pooling: Pooling) -> EncoderOptions:
    return EncoderOptions(pooling=pooling)


def _own_forward(folder: Path, family: str, pixels: Tensor) -> np.ndarray:
    """The last hidden state by the model's own class, without what this project does about it."""
    if family == "vit-mae":  # its encoder is a ViT, which masks nothing
        network = transformers.ViTModel(transformers.ViTConfig(**FAMILIES["vit-classifier"][2]), False)
        masked = transformers.ViTMAEModel.from_pretrained(folder)
        network.load_state_dict(masked.state_dict())
    else:
        network = transformers.AutoModel.from_pretrained(folder)
        network = getattr(network, "vision_model", network)
    with torch.no_grad():
        return network.eval()(pixel_values=pixels).last_hidden_state.numpy()


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def _same_row_always(encoder: Encoder) -> None:
    pictures = _pictures()
    together = encoder.embed(pictures)
    for order in ([2, 0, 3, 1], [1, 1, 0, 0]):
        assert _cosines(encoder.embed([pictures[number] for number in order]), together[order]).min() >= 0.99999
    alone = np.concatenate([encoder.embed([picture]) for picture in pictures])
    assert _cosines(alone, together).min() >= 0.99999


@pytest.mark.parametrize("family", TOKENS)
def test_rows_are_those_of_the_models_own_forward(models: Path, family: str) -> None:
    before, whole = TOKENS[family]
    encoder = load_encoder(str(models / family), _with("mean-patch"))
    pixels = np.stack([encoder.prepare.numbers(picture) for picture in _pictures()])
    hidden = _own_forward(models / family, family, torch.from_numpy(pixels))
    token, patches = hidden[:, 0], hidden[:, before:].mean(axis=1)
    np.testing.assert_allclose(encoder.embed(_pictures()), patches, atol=1e-5)
    _same_row_always(encoder)
    assert load_encoder(str(models / family), _with("mean-patch")).weights_digest == encoder.weights_digest
    if not whole:
        with pytest.raises(ConfigError, match="no class token; expected --pooling mean-patch"):
            load_encoder(str(models / family), _with("cls"))
        return
    both = load_encoder(str(models / family), _with("both")).embed(_pictures())
    np.testing.assert_allclose(both, np.concatenate([token, patches], axis=1), atol=1e-5)
    np.testing.assert_allclose(load_encoder(str(models / family)).embed(_pictures()), token, atol=1e-5)


def test_masked_autoencoder_gives_the_same_bits_in_every_process(models: Path) -> None:
    torch.manual_seed(1)
    first = load_encoder(str(models / "vit-mae")).embed(_pictures())
    torch.manual_seed(2)
    second = load_encoder(str(models / "vit-mae"))
    np.testing.assert_array_equal(first, second.embed(_pictures()))
    assert "nothing masked" in second.preprocessing  # rows made before were masked at random: another encoder


def test_encoder_that_is_no_function_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_random(sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, None, None]:
        return sequence[:, torch.randperm(sequence.shape[1])[:4]], None, None

    monkeypatch.setattr(backbones, "_keep_all", at_random)
    monkeypatch.setattr(backbones, "tokens_before_patches", lambda *facts: 1)
    with pytest.raises(ConfigError, match=r"same row for the same picture.*no function of the picture") as caught:
        load_encoder(str(models / "vit-mae"))
    assert "\n" not in str(caught.value)


def test_map_of_as_many_channels_as_rows_is_averaged_over_its_positions(models: Path, tmp_path: Path) -> None:
    """128x64 pixels become 16x8 positions of 16 channels: which of the sides are positions follows from the input."""
    folder = copied(models / "resnet", tmp_path / "resnet")
    for height, width in ((128, 64), (64, 128), (128, 128), (112, 60)):
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        encoder = load_encoder(str(folder), _with("mean-patch"))
        pixels = torch.from_numpy(np.stack([encoder.prepare.numbers(picture) for picture in _pictures()]))
        hidden = _own_forward(folder, "resnet", pixels)
        assert hidden.shape[:2] == (4, 16)
        np.testing.assert_allclose(encoder.embed(_pictures()), hidden.mean((2, 3)), atol=1e-5)


def test_pooled_token_is_part_of_what_sites_compare(models: Path) -> None:
    """Rows that once had the pooled token among the patches must not meet today's."""
    identity = identity_of(load_encoder(str(models / "dinov3-convnext"), _with("mean-patch")), ["a"])
    assert identity.preprocessing.endswith("; 1 tokens before the patches; pooling mean-patch")
    plain = identity_of(load_encoder(str(models / "dinov3-vit"), _with("mean-patch")), ["a"])
    assert "tokens before" not in plain.preprocessing


def _without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def _renamed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {prefix + key: value for key, value in weights.items()}


def _extra(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: weights | {name: torch.ones(32)}


def _cut(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: value[:, :5] if part in key else value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("dinov2", _renamed("module.backbone."), r"embeddings\.cls_token \(missing\), .* and \d+ more"),
        ("dinov2", _without("layer.1."), r"encoder\.layer\.1\.\S+ \(missing\), .* and \d+ more"),
        ("dinov2", _without("layer.1.norm2.bias"), r"found encoder\.layer\.1\.norm2\.bias \(missing\); give"),
        ("dinov2", _without("position_embeddings"), r"position_embeddings \(missing\)"),
        ("dinov2", _cut("position_embeddings"), r"position_embeddings \(\(1, 5, 32\) for \(1, 17, 32\)\)"),
        ("dinov2", _extra("encoder.layer.2.norm1.weight"), r"layer\.2\.norm1\.weight \(not of the model\)"),
        ("dinov2", _extra("embeddings.register_tokens"), r"embeddings\.register_tokens \(not of the model\)"),
        ("vit-classifier", _extra("vit.encoder.layer.0.lora.weight"), r"lora\.weight \(not of the model\)"),
        ("clip", _without("vision_model"), r"vision_model\.embeddings\.class_embedding \(missing\)"),
        ("dinov3-vit", _without("register_tokens"), r"embeddings\.register_tokens \(missing\)"),
        ("siglip", _without("vision_model.post_layernorm"), r"vision_model\.post_layernorm\.\S+ \(missing\)"),
        ("resnet", _without("running_var"), r"running_var \(missing\)"),
    ],
)
def test_weights_of_the_features_that_are_wrong_are_named(
    models: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    named: str,
) -> None:
    change_weights(copied(models / family, tmp_path / "changed"), change)
    with pytest.raises(ConfigError, match=named) as caught:
        load_encoder(str(tmp_path / "changed"), _with("mean-patch"))
    assert "\n" not in str(caught.value)
    assert "MISSING" not in caplog.text  # of the library's own table
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("vit-classifier", _without("classifier")),  # it never had the pooler
        ("dinov2", _without("mask_token")),
        ("clip", _without("text_model")),
        ("clip", _without("post_layernorm")),
        ("siglip", _without("vision_model.head")),
        ("beit", _without("pooler")),
        ("vit-mae", _without("decoder")),
        ("resnet", _without("num_batches_tracked")),
        ("dinov2", _extra("head.mlp.0.weight")),
        ("clip", _extra("vision_model.embeddings.position_ids")),
    ],
)
def test_weights_that_no_feature_depends_on_may_be_anything(
    models: Path, tmp_path: Path, family: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Rows and digest stay those of the whole checkpoint, at each load."""
    whole = load_encoder(str(models / family), _with("mean-patch"))
    change_weights(copied(models / family, tmp_path / "changed"), change)
    for _ in range(2):
        changed = load_encoder(str(tmp_path / "changed"), _with("mean-patch"))
        assert identity_of(changed, ["a"]) == identity_of(whole, ["a"])
        np.testing.assert_array_equal(changed.embed(_pictures()), whole.embed(_pictures()))


def test_digest_is_over_every_weight_of_the_features_and_no_other(models: Path, tmp_path: Path) -> None:
    folder = copied(models / "beit", tmp_path / "beit")
    digest = load_encoder(str(folder)).weights_digest
    stored = load_file(folder / "model.safetensors")
    for key in stored:
        change_weights(folder, lambda weights, key=key: stored | {key: stored[key] + 0.01})
        assert (load_encoder(str(folder)).weights_digest == digest) == key.startswith("pooler."), key


def test_former_digest_is_over_the_whole_state(models: Path) -> None:
    """As releases wrote it before: computed here by itself."""
    state = transformers.AutoModel.from_pretrained(models / "dinov2").state_dict()
    expected = hashlib.sha256()
    for name in sorted(state):
        expected.update(f"{name} {tuple(state[name].shape)} torch.float32 ".encode())
        expected.update(state[name].numpy().tobytes())
    encoder = load_encoder(str(models / "dinov2"))
    assert encoder.former_digest == expected.hexdigest() != encoder.weights_digest
    assert load_encoder(str(models / "vit-classifier")).former_digest == ""  # its pooler was random


@pytest.mark.parametrize(
    "processor",
    [
        {"do_center_crop": False},
        {"do_center_crop": False, "size": {"shortest_edge": 24}},
        {"do_resize": False, "do_center_crop": False},
    ],
)
def test_processor_of_ragged_pictures_is_refused(tmp_path: Path, processor: dict[str, object]) -> None:
    save_model(tmp_path, "dinov2", **processor)
    with pytest.raises(
        ConfigError, match=r"pictures of different sizes \(.*\); set do_center_crop and crop_size"
    ) as no:
        load_encoder(str(tmp_path))
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("weight", "processor"),
    [(float("nan"), {}), (float("inf"), {}), (1.0, {"rescale_factor": 0.0})],
)
def test_rows_that_say_nothing_are_refused(tmp_path: Path, weight: float, processor: dict[str, object]) -> None:
    save_model(tmp_path, "dinov2", **processor)
    change_weights(tmp_path, lambda weights: weights | {"layernorm.bias": weights["layernorm.bias"] * weight})
    with pytest.raises(ConfigError, match=r"finite numbers that differ between pictures.*rescale_factor") as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_setting_of_a_wrong_kind_is_named_with_what_is_wrong(models: Path, tmp_path: Path) -> None:
    """The library says that in its second line."""
    folder = copied(models / "beit", tmp_path / "beit")
    change_config(folder, layer_scale_init_value=0)
    with pytest.raises(ConfigError, match=r"field 'layer_scale_init_value': TypeError: .* expected float") as caught:
        load_encoder(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["CLIPTextModel", "BertModel"])
def test_model_of_no_pictures_is_one_line(tmp_path: Path, model: str) -> None:
    config = getattr(transformers, model).config_class
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    getattr(transformers, model)(config(vocab_size=30, **small)).save_pretrained(tmp_path)
    save_model(tmp_path / "other", "dinov2")
    (tmp_path / "other" / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    with pytest.raises(ConfigError, match="the model can't") as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_damaged_files_are_one_line(models: Path, tmp_path: Path) -> None:
    for number, (name, content) in enumerate(
        (
            ("model.safetensors", b"\x00" * 64),
            ("model.safetensors", b""),
            ("config.json", b"{"),
            ("config.json", b"[]"),
            ("preprocessor_config.json", b"[1]"),
        )
    ):
        folder = copied(models / "dinov2", tmp_path / str(number))
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match="the model can't be loaded") as caught:
            load_encoder(str(folder))
        assert "\n" not in str(caught.value)


def test_class_token_of_a_head_is_no_token_of_the_patches(tmp_path: Path) -> None:
    """The pooling head of AIMv2 has a class token of its own; its features are patches alone."""
    folder = save_model(tmp_path / "aim", "dinov2")
    network = transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**FAMILIES["vit-classifier"][2])).eval()
    network.save_pretrained(folder)
    with pytest.raises(ConfigError, match="no class token"):
        load_encoder(str(folder))
    encoder = load_encoder(str(folder), _with("mean-patch"))
    pixels = torch.from_numpy(np.stack([encoder.prepare.numbers(picture) for picture in _pictures()]))
    with torch.no_grad():
        hidden = network(pixel_values=pixels).last_hidden_state
    assert hidden.shape[1] == 16
    np.testing.assert_allclose(encoder.embed(_pictures()), hidden.mean(1), atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean-patch"])
def test_first_of_a_models_groups_is_no_class_token(tmp_path: Path, pooling: Pooling) -> None:
    """GroupViT ends with tokens of groups, here one more than a grid has."""
    folder = save_model(tmp_path / "groups", "dinov2")
    vision = {**FAMILIES["vit-classifier"][2], "depths": [1, 1], "num_group_tokens": [17, 0]}
    vision["num_output_groups"] = [17, 0]
    texts = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = transformers.GroupViTConfig(vision_config=vision, text_config=texts)
    transformers.GroupViTModel(config).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no class token|found 17 tokens for an input of 32x32"):
        load_encoder(str(folder), _with(pooling))


def test_tokens_that_do_not_come_out_are_refused(models: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "yolos", "dinov2")
    config = transformers.YolosConfig(
        **FAMILIES["vit-classifier"][2] | {"image_size": [32, 32]}, num_detection_tokens=5
    )
    transformers.YolosModel(config).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"expected 1 tokens before .*; found 22 tokens for an input of 32x32"):
        load_encoder(str(folder), _with("mean-patch"))
    assert load_encoder(str(folder)).dimension == 32


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5}


class TestTimm:
    """Checkpoints of timm, such as UNI, Virchow and H-optimus are."""

    @pytest.fixture(autouse=True)
    def _needs_timm(self) -> None:
        pytest.importorskip("timm", reason="timm's checkpoints need the extra `timm`")

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("tokens", [{}, {"reg_tokens": 4}, {"reg_tokens": 2, "class_token": False}])
    def test_rows_are_those_of_timm(self, tmp_path: Path, tokens: dict[str, object], plain: bool) -> None:
        import timm

        pooled = {"global_pool": "avg"} if "class_token" in tokens else {}
        architecture, arguments = "vit_tiny_patch16_224", {**VIT, **tokens, **pooled}
        save_timm(tmp_path, architecture, plain=plain, **arguments)
        model = timm.create_model(architecture, num_classes=0, **arguments).eval()
        stored = load_file(tmp_path / "model.safetensors")
        model.load_state_dict({key.removeprefix("timm_model."): value for key, value in stored.items()})
        before = int(tokens.get("reg_tokens", 0)) + bool(tokens.get("class_token", True))
        encoder = load_encoder(str(tmp_path), _with("mean-patch"))
        pixels = torch.from_numpy(np.stack([encoder.prepare.numbers(picture) for picture in _pictures()]))
        with torch.no_grad():
            hidden = model.forward_features(pixels)
        np.testing.assert_allclose(encoder.embed(_pictures()), hidden[:, before:].mean(1), atol=1e-5)
        _same_row_always(encoder)
        if "class_token" in tokens:
            with pytest.raises(ConfigError, match="no class token"):
                load_encoder(str(tmp_path), _with("both"))
        else:
            np.testing.assert_allclose(load_encoder(str(tmp_path)).embed(_pictures()), hidden[:, 0], atol=1e-5)

    def test_pictures_are_prepared_as_timm_does(self, tmp_path: Path) -> None:
        import timm
        from PIL import Image

        save_timm(tmp_path, "vit_tiny_patch16_224", **VIT)
        encoder = load_encoder(str(tmp_path))
        settings = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}
        prepare = timm.data.create_transform(**settings, crop_pct=0.8)
        for picture in (one for one in _pictures() if one.ndim == 3):
            np.testing.assert_allclose(
                encoder.prepare.numbers(picture), prepare(Image.fromarray(picture)).numpy(), atol=1e-6
            )
        assert '"crop_pct": 0.8' in encoder.preprocessing

    def test_maps_are_averaged_over_their_positions(self, tmp_path: Path) -> None:
        """A windowed transformer of timm has its channels last."""
        small = {"img_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
        for name, architecture, arguments, positions in (
            ("swin", "swin_tiny_patch4_window7_224", small, (1, 2)),
            ("resnet", "resnet10t", {}, (2, 3)),
        ):
            save_timm(tmp_path / name, architecture, **arguments)
            encoder = load_encoder(str(tmp_path / name), _with("mean-patch"))
            pixels = torch.from_numpy(np.stack([encoder.prepare.numbers(picture) for picture in _pictures()]))
            network = transformers.AutoModel.from_pretrained(tmp_path / name).eval().timm_model
            with torch.no_grad():
                expected = network.forward_features(pixels).mean(positions)
                np.testing.assert_allclose(expected, network.forward_head(network.forward_features(pixels)), atol=1e-5)
            np.testing.assert_allclose(encoder.embed(_pictures()), expected, atol=1e-5)

    @pytest.mark.parametrize(
        ("arguments", "change", "named"),
        [
            ({}, _without("blocks.1."), r"timm_model\.blocks\.1\.norm1\.weight \(missing\)"),
            ({}, _renamed("module."), r"timm_model\.cls_token \(missing\)"),
            ({"reg_tokens": 4}, _without("reg_token"), r"found timm_model\.reg_token \(missing\)"),
            # settings that the checkpoint's page names and its config.json may lack
            ({}, _extra("reg_token"), r"timm_model\.reg_token \(not of the model\)"),
            ({"init_values": None}, _extra("blocks.0.ls1.gamma"), r"blocks\.0\.ls1\.gamma \(not of the model\)"),
            ({}, _extra("norm_pre.weight"), r"timm_model\.norm_pre\.weight \(not of the model\)"),
        ],
    )
    def test_wrong_weights_are_named(
        self,
        tmp_path: Path,
        arguments: dict[str, object],
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        named: str,
    ) -> None:
        save_timm(tmp_path, "vit_tiny_patch16_224", plain=True, **VIT | arguments)
        change_weights(tmp_path, change)
        with pytest.raises(ConfigError, match=named):
            load_encoder(str(tmp_path))

    def test_classifier_of_timm_has_the_same_digest(self, tmp_path: Path) -> None:
        save_timm(tmp_path, "vit_tiny_patch16_224", plain=True, **VIT)
        digest = load_encoder(str(tmp_path)).weights_digest
        change_weights(
            tmp_path, lambda weights: weights | {"head.weight": torch.ones(4, 32), "head.bias": torch.ones(4)}
        )
        assert load_encoder(str(tmp_path)).weights_digest == digest


def test_timm_that_is_missing_is_one_line(models: Path, tmp_path: Path) -> None:
    if transformers.utils.is_timm_available():
        pytest.skip("timm is installed here")
    folder = copied(models / "dinov2", tmp_path / "timm")
    change_config(folder, model_type="timm_wrapper", architecture="vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"run: pip install '\.\[timm\]' in the project's folder") as caught:
        load_encoder(str(folder))
    assert "\n" not in str(caught.value)


def test_another_library_that_is_missing_is_not_called_timm(models: Path, tmp_path: Path) -> None:
    folder = copied(models / "dinov2", tmp_path / "quantized")
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match=r"the model can't be loaded .*pip install optimum") as caught:
        load_encoder(str(folder))
    assert "timm" not in str(caught.value)
    assert "\n" not in str(caught.value)
