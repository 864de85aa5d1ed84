"""Stores, unfinished parts and classifiers of a release whose digest held weights that no feature depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from common.wire.identity import EncoderIdentity
from deploy.classifier.predict import encoder_of
from embeddings.encoders.backbones import TransformersEncoder
from embeddings.encoders.base import EncoderOptions, identity_of
from embeddings.encoders.load import load_encoder
from embeddings.encoders.preparation import Preparation
from embeddings.extract import Outcome, extract, work_folder
from embeddings.pipeline import Item, embed_batches
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.store.file import read_metadata, read_store
from embeddings.store.parts import Parts
from tests.embeddings.encoders.tiny import change_config, change_weights, copied, save_model

SALT = bytes(range(32))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for number in range(6):
        (tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        picture.save(tmp_path / "images" / "ab"[number % 2] / f"{number}.png")
    return tmp_path / "images"


def _load(folder: Path) -> TransformersEncoder:
    encoder = load_encoder(str(folder), EncoderOptions(batch_size=2))
    assert isinstance(encoder, TransformersEncoder)
    return encoder


def _as_before(encoder: TransformersEncoder, digest: str) -> TransformersEncoder:
    """An encoder as an earlier release made it: its revision and digest come from the whole state."""
    return dataclasses.replace(encoder, weights_digest=digest, former_digest=digest, revision=digest[:16])


def _extract(images: Path, out: Path, encoder: TransformersEncoder) -> Outcome:
    return extract(list_folder(images, None, FolderOptions()), encoder, out, SALT)


def test_old_store_goes_on_and_is_renewed(tmp_path: Path, images: Path, tiny_dinov2: Path) -> None:
    encoder, out = _load(tiny_dinov2), tmp_path / "out.parquet"
    _extract(images, out, _as_before(encoder, encoder.former_digest))
    before = read_store(out)
    assert before.metadata.identity.weights_digest == encoder.former_digest
    outcome = _extract(images, out, encoder)
    assert (outcome.embedded, outcome.reused) == (0, 6)
    after = read_store(out)
    assert after.metadata.identity == identity_of(encoder, ["a", "b"])
    np.testing.assert_array_equal(after.embeddings, before.embeddings)
    Image.new("RGB", (30, 30), "red").save(images / "a" / "new.png")
    assert _extract(images, out, encoder).embedded == 1


def test_old_store_of_other_weights_is_refused(tmp_path: Path, images: Path, tiny_dinov2: Path) -> None:
    encoder, out = _load(tiny_dinov2), tmp_path / "out.parquet"
    _extract(images, out, _as_before(encoder, encoder.former_digest))
    other = copied(tiny_dinov2, tmp_path / "other")
    change_weights(other, lambda weights: {key: value * 1.001 for key, value in weights.items()})
    with pytest.raises(DataError, match="was made with another encoder"):
        _extract(images, out, _load(other))


def test_old_store_with_a_random_pooler_in_its_digest_goes_on_by_its_canary(tmp_path: Path, images: Path) -> None:
    """That digest was another one at each load."""
    folder = save_model(tmp_path / "model", "vit-classifier")
    encoder, out = _load(folder), tmp_path / "out.parquet"
    _extract(images, out, _as_before(encoder, "c0ffee" * 10 + "beef"))
    outcome = _extract(images, out, encoder)
    assert (outcome.embedded, outcome.reused) == (0, 6)
    assert read_metadata(out).identity.weights_digest == encoder.weights_digest
    change_weights(folder, lambda weights: {key: value * 1.0001 for key, value in weights.items()})
    with pytest.raises(DataError, match="was made with another encoder"):
        _extract(images, out, _load(folder))


def test_parts_of_an_old_interrupted_run_are_taken_up(tmp_path: Path, images: Path, tiny_dinov2: Path) -> None:
    encoder, out = _load(tiny_dinov2), tmp_path / "out.parquet"
    reference = tmp_path / "reference.parquet"
    _extract(images, reference, encoder)
    done = read_store(reference)
    old = identity_of(_as_before(encoder, encoder.former_digest), ())
    assert done.keys is not None
    Parts(work_folder(out), old.fingerprint()).save(done.embeddings[:4], done.keys[:4])
    outcome = _extract(images, out, encoder)
    assert (outcome.resumed, outcome.embedded) == (4, 2)
    np.testing.assert_array_equal(read_store(out).embeddings, done.embeddings)


def test_predict_takes_a_classifier_of_an_old_digest(tmp_path: Path, tiny_dinov2: Path) -> None:
    encoder = _load(tiny_dinov2)
    today = identity_of(encoder, ["a", "b"])
    old = dataclasses.replace(today, revision=encoder.former_digest[:16], weights_digest=encoder.former_digest)
    for identity in (today, old):
        found = encoder_of(identity, str(tiny_dinov2), EncoderOptions())
        assert found.weights_digest == encoder.weights_digest
    wrong = dataclasses.replace(old, weights_digest="0" * 64)
    with pytest.raises(DataError, match="weights_digest"):
        encoder_of(wrong, str(tiny_dinov2), EncoderOptions())


def test_identity_of_the_offline_encoder_is_as_ever() -> None:
    """The demonstration's cached embeddings are known by it."""
    pytest.importorskip("efficientnet_lite_pytorch")
    encoder = load_encoder("efficientnet-lite0")
    expected = EncoderIdentity(
        "efficientnet-lite0",
        "efficientnet-lite0-57934424",
        1280,
        "pil bicubic, shorter side to 112, centre crop 112x112, grey to rgb, /255, imagenet mean and std; "
        "batch norm folded; mean over positions",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "float32",
        ("a",),
    )
    assert identity_of(encoder, ["a"]) == expected
    assert encoder.former_digest == encoder.weights_digest


def test_picture_that_can_not_be_prepared_costs_itself_alone(tiny_dinov2: Path) -> None:
    encoder = _load(tiny_dinov2)
    processor = encoder.prepare.processor

    class Fragile:
        """The model's processor, which fails over two pictures: with an error, and with another shape."""

        def __call__(self, images: list[np.ndarray], **options: object) -> dict[str, np.ndarray]:
            if images[0][0, 0, 0] == 1:
                raise ZeroDivisionError("integer division\nby zero")
            values = processor(images=images, **options)["pixel_values"]
            return {"pixel_values": values[:, :, :14] if images[0][0, 0, 0] == 4 else values}

    pictures = [np.full((20, 20, 3), number, np.uint8) for number in range(6)]
    items = [Item(f"{number}.png", lambda number=number: pictures[number], number) for number in range(6)]
    batches = list(embed_batches(items, dataclasses.replace(encoder, prepare=Preparation(Fragile(), (3, 28, 28)))))
    rows = np.concatenate([batch.embeddings for batch in batches])
    np.testing.assert_allclose(rows, encoder.embed([pictures[number] for number in (0, 2, 3, 5)]), atol=1e-5)
    rejected = [(item.source, reason) for batch in batches for item, reason in batch.rejected]
    assert [source for source, _ in rejected] == ["1.png", "4.png"]
    assert rejected[0][1] == "the encoder can't prepare it (ZeroDivisionError: integer division)"
    assert "expected an input of (3, 28, 28) of the processor, found (3, 14, 28)" in rejected[1][1]


@pytest.mark.parametrize("interrupted", [False, True])
def test_rows_of_changed_settings_are_not_mixed(
    tmp_path: Path, images: Path, tiny_dinov2: Path, interrupted: bool
) -> None:
    """Neither weights nor preprocessing tell of `hidden_act`: another row of the canary does."""
    folder, out = copied(tiny_dinov2, tmp_path / "model"), tmp_path / "out.parquet"
    _extract(images, out, _load(folder))
    before = read_store(out)
    if interrupted:  # all of it is left in the working folder, as after a kill
        out.unlink()
        identity = identity_of(_load(folder), [])
        parts = Parts(work_folder(out), identity.fingerprint(), canary=before.metadata.canary)
        parts.save(before.embeddings, before.keys)
    change_config(folder, hidden_act="relu")
    changed = _load(folder)
    assert identity_of(changed, []) == dataclasses.replace(before.metadata.identity, class_names=())
    if not interrupted:
        with pytest.raises(DataError, match=r"other settings of the encoder.*config\.json.*write to another file"):
            _extract(images, out, changed)
        np.testing.assert_array_equal(read_store(out).embeddings, before.embeddings)
    else:
        assert _extract(images, out, changed).embedded == 6
        assert np.abs(read_store(out).embeddings - before.embeddings).max() > 1e-3
