from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError, MeetingError
from common.wire.agreement import all_findings, check_sites, compare_canaries, decode, encode, require_agreement
from common.wire.identity import EncoderIdentity, compare
from embeddings.canary import CANARY_FILE, draw, embed_canary
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.load import load_encoder
from embeddings.readers.patients import image_key, load_salt, patient_number
from embeddings.store.sets import SetMetadata

ONE = EncoderIdentity("enc", "r", 8, "resize", "d" * 64, "float32", ("a", "b"))


def test_compare_agreeing_sites_have_one_fingerprint() -> None:
    assert compare({"x": ONE, "y": dataclasses.replace(ONE)}) == ()
    assert ONE.fingerprint() == dataclasses.replace(ONE).fingerprint()
    assert EncoderIdentity.from_json(ONE.to_json()) == ONE


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("dimension", 16, "16"),
        ("preprocessing", "crop", "crop"),
        ("weights_digest", "e" * 64, "e" * 64),
        ("precision", "bfloat16", "bfloat16"),
        ("class_names", ("b", "a"), "b, a"),
    ],
)
def test_compare_names_the_site_and_the_field(field: str, value: object, shown: str) -> None:
    other = dataclasses.replace(ONE, **{field: value})
    assert other.fingerprint() != ONE.fingerprint()
    (mismatch,) = compare({"north": ONE, "south": other, "west": ONE})
    assert (mismatch.site, mismatch.field, mismatch.found) == ("south", field, shown)
    assert str(mismatch).startswith(f"site south: {field} is {shown}, the other sites have ")


@pytest.mark.parametrize(("field", "value"), [("encoder", "local:dinov2"), ("revision", "d" * 16)])
def test_the_same_weights_from_a_hub_and_from_a_folder_are_one_encoder(field: str, value: str) -> None:
    folder = dataclasses.replace(ONE, **{field: value})
    assert compare({"hub": ONE, "folder": folder}) == ()
    others = dataclasses.replace(folder, weights_digest="e" * 64)  # other weights: where they came from is told, too
    assert {one.field for one in compare({"a": ONE, "b": ONE, "c": others})} == {field, "weights_digest"}
    # declared by a person: the name is all there is
    declared = dataclasses.replace(ONE, weights_digest="declared, not measured")
    (mismatch,) = compare({"a": declared, "b": dataclasses.replace(declared, **{field: value})})
    assert mismatch.field == field


def test_from_json_refuses_other_fields_and_types() -> None:
    for value in ({"encoder": "x"}, {**ONE.to_json(), "more": 1}, {**ONE.to_json(), "dimension": "8"}):
        with pytest.raises(DataError, match="encoder identity"):
            EncoderIdentity.from_json(value)


def test_canary_file_is_the_drawing() -> None:
    np.testing.assert_array_equal(np.asarray(Image.open(CANARY_FILE)), draw())


def test_canary_text_keeps_the_bits(rng: np.random.Generator) -> None:
    vector = rng.standard_normal(9).astype(np.float32)
    np.testing.assert_array_equal(decode(encode(vector)), vector)
    with pytest.raises(DataError, match="base64"):
        decode("no base64!")


def test_compare_canaries_names_the_site_that_differs(rng: np.random.Generator) -> None:
    right = rng.standard_normal(32).astype(np.float32)
    near = right * np.float32(1 + 1e-5)
    wrong = right + np.float32(0.01)
    assert compare_canaries({"a": right, "b": near, "c": right}, "float32") == ()
    (mismatch,) = compare_canaries({"a": right, "b": wrong, "c": near}, "float32")
    assert mismatch.site == "b"
    assert compare_canaries({"a": right, "b": wrong, "c": near}, "bfloat16") == ()
    narrow, broken = right[:8], np.full(32, np.nan, dtype=np.float32)
    assert [one.site for one in compare_canaries({"a": right, "b": narrow, "c": near}, "float32")] == ["b"]
    assert "b" in [one.site for one in compare_canaries({"a": right, "b": broken, "c": near}, "float32")]


def test_canary_finds_a_wrong_resizing_rule_and_wrong_weights(tiny_dinov2: Path, tmp_path: Path) -> None:
    """What the identity can't see: a folder that claims the right settings, but computes something else."""
    import torch

    encoder = load_encoder(str(tiny_dinov2))
    right = embed_canary(encoder)
    same = embed_canary(load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=3)))
    original = encoder.prepare.processor.resample
    encoder.prepare.processor.resample = 0
    nearest = embed_canary(encoder)
    encoder.prepare.processor.resample = original
    with torch.no_grad():
        encoder.network.encoder.layer[0].mlp.fc1.weight.mul_(1.05)
    changed = embed_canary(encoder)
    found = compare_canaries({"a": right, "b": same, "c": right, "nearest": nearest, "changed": changed}, "float32")
    assert {mismatch.site for mismatch in found} == {"nearest", "changed"}


def test_check_sites_compares_canaries_when_identities_agree(rng: np.random.Generator) -> None:
    right = rng.standard_normal(8).astype(np.float32)
    good, bad = SetMetadata(ONE, canary=encode(right)), SetMetadata(ONE, canary=encode(-right))
    require_agreement({"a": good, "b": good})
    assert {mismatch.field for mismatch in check_sites({"a": good, "b": bad, "c": good})} == {"canary embedding"}
    with pytest.raises(MeetingError, match="site b: canary embedding"):
        require_agreement({"a": good, "b": bad, "c": good})
    other = dataclasses.replace(good, identity=dataclasses.replace(ONE, dimension=9))
    assert [mismatch.field for mismatch in check_sites({"a": good, "b": other, "c": good})] == ["dimension"]
    imported = SetMetadata(ONE)
    assert check_sites({"a": good, "b": imported}) == ()


def test_sites_that_label_different_findings_agree_on_all_of_them() -> None:
    one = SetMetadata(dataclasses.replace(ONE, class_names=("mass", "effusion")), task="multilabel")
    other = SetMetadata(dataclasses.replace(ONE, class_names=("cyst", "mass")), task="multilabel")
    assert check_sites({"a": one, "b": other}) == ()
    wrong = dataclasses.replace(other, identity=dataclasses.replace(other.identity, dimension=9))
    assert [mismatch.field for mismatch in check_sites({"a": one, "b": wrong, "c": one})] == ["dimension"]
    classes = [dataclasses.replace(facts, task="multiclass") for facts in (one, other)]
    assert {mismatch.field for mismatch in check_sites(dict(zip("ab", classes, strict=True)))} == {"class_names"}
    assert all_findings([one.class_names, other.class_names]) == (("cyst", "effusion", "mass"), ((0, 2), (1, 2)))
    assert all_findings([("b", "a"), ("b", "a")]) == (("b", "a"), ())
    assert all_findings([("b", "a"), ("a", "b")]) == (("a", "b"), ())


def test_load_salt_is_drawn_once_and_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "home" / "patient.salt"
    salt = load_salt(path)
    assert len(salt) == 32
    assert load_salt(path) == salt
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_salt(tmp_path / "other.salt") != salt
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="expected a salt of 32 bytes, found 5"):
        load_salt(path)


def test_patient_number_depends_on_the_salt() -> None:
    import hashlib
    import hmac

    expected = hmac.new(b"s" * 32, b"patient\0Doe", hashlib.sha256).digest()[:8]
    assert patient_number(b"s" * 32, "Doe") == int.from_bytes(expected, "big", signed=True)
    assert patient_number(b"s" * 32, "Doe") != patient_number(b"t" * 32, "Doe")


def test_image_key_depends_on_the_salt() -> None:
    """Else a file's name could be found by trying names against a store's part."""
    keys = {image_key(salt, "ct/4711.dcm", 3) for salt in (b"a" * 32, b"b" * 32)}
    assert len(keys) == 2
    assert image_key(b"a" * 32, "ct/4711.dcm", 3) in keys
