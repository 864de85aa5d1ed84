from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from common.wire.identity import EncoderIdentity
from embeddings.quality.pictures import who_has_what
from embeddings.quality.quality import NEAR, inspect, linear_probe
from embeddings.quality.quality_page import facts, render_page
from embeddings.store.sets import EmbeddingSet, SetMetadata

IDENTITY = EncoderIdentity("enc", "r", 128, "p", "d", "float32", ("a<b", "c", "d"))


@pytest.fixture
def data(rng: np.random.Generator) -> EmbeddingSet:
    """Three classes two deviations apart, 128 wide: easily told from each other, no two rows near."""
    labels = rng.integers(0, 3, 600)
    centres = 2.0 * rng.standard_normal((3, 128))
    embeddings = (centres[labels] + rng.standard_normal((600, 128))).astype(np.float32)
    return EmbeddingSet(embeddings, labels, SetMetadata(IDENTITY), groups=np.arange(600) // 2)


def test_inspect_clean_set_has_no_problems(data: EmbeddingSet, rng: np.random.Generator) -> None:
    quality = inspect(data, rng)
    assert quality.problems == ()
    assert (quality.exact_count, quality.near_count) == (0, 0)
    assert quality.class_counts == tuple(np.bincount(data.labels))
    assert (quality.patients, quality.most_per_patient) == (300, 2)
    norms = np.linalg.norm(data.embeddings, axis=1)
    np.testing.assert_allclose(quality.norm_quantiles[2], np.median(norms), rtol=1e-5)
    assert quality.probe is not None
    assert quality.probe.balanced_accuracy > 0.97


def test_inspect_finds_bad_rows_by_number(data: EmbeddingSet, rng: np.random.Generator) -> None:
    data.embeddings[[4, 9]] = [[np.nan], [np.inf]]
    data.embeddings[17] = 3.5
    data.labels[[30, 31]] = [3, -1]
    quality = inspect(data, rng)
    assert quality.non_finite == (4, 9)
    assert quality.constant == (17,)
    assert quality.outside_classes == (30, 31)
    assert len(quality.problems) == 3


def test_inspect_finds_exact_and_near_duplicates_like_brute_force(data: EmbeddingSet, rng: np.random.Generator) -> None:
    data.embeddings[50] = data.embeddings[10]
    data.embeddings[51] = data.embeddings[10]
    for row, scale in ((60, 1e-3), (61, 0.01), (62, 0.02), (63, 0.03), (64, 0.1)):
        noise = rng.standard_normal(128)
        data.embeddings[row] = data.embeddings[20] + scale * noise
    centred = data.embeddings - data.embeddings.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    left, right = np.nonzero(np.triu(centred @ centred.T >= NEAR, 1))
    expected = {(int(i), int(j)) for i, j in zip(left, right, strict=True)} - {(10, 50), (10, 51), (50, 51)}
    quality = inspect(data, rng)
    assert set(quality.exact_duplicates) == {(10, 50), (10, 51)}
    assert set(quality.near_duplicates) == expected
    assert len(expected) > 4


def test_inspect_finds_duplicates_across_labels_and_splits(data: EmbeddingSet, rng: np.random.Generator) -> None:
    splits = np.asarray(["train", "test"])[np.arange(600) % 2]
    data.embeddings[101] = data.embeddings[100]
    data.labels[100], data.labels[101] = 0, 1
    quality = inspect(dataclasses.replace(data, splits=splits), rng)
    assert (quality.conflicts, quality.leaks) == (1, 1)
    assert any("different labels" in line for line in quality.problems)
    assert any("different splits" in line for line in quality.problems)


def test_inspect_empty_and_tiny_sets(data: EmbeddingSet, rng: np.random.Generator) -> None:
    for rows in (0, 1, 2):
        small = data.take(np.arange(rows))
        quality = inspect(small, rng)
        assert quality.rows == rows
        assert facts(quality)
        assert render_page("x", small, quality, rng)


def test_linear_probe_of_noise_is_chance(rng: np.random.Generator) -> None:
    labels = np.arange(3000) % 3
    data = EmbeddingSet(rng.standard_normal((3000, 128)).astype(np.float32), labels, SetMetadata(IDENTITY))
    probe = linear_probe(data, rng)
    assert probe is not None
    assert abs(probe.balanced_accuracy - 1 / 3) < 0.06
    assert probe.chance == pytest.approx(1 / 3)


def test_render_page_is_one_escaped_file_with_pictures(data: EmbeddingSet, rng: np.random.Generator) -> None:
    page = render_page("<script>", data, inspect(data, rng), rng)
    assert "<script>" not in page
    assert "a&lt;b" in page
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_who_has_what_is_a_picture(tmp_path: Path) -> None:
    png = who_has_what(np.asarray([[3, 0], [1, 5]]), ["north", "south"], ["a", "b"])
    assert png.startswith(b"\x89PNG")
    assert png == who_has_what(np.asarray([[3, 0], [1, 5]]), ["north", "south"], ["a", "b"])


@pytest.mark.parametrize(("rows", "classes", "width"), [(0, 2, 4), (1, 2, 4), (3, 1, 1), (10, 1, 4), (60, 2, 4)])
@pytest.mark.parametrize("kind", ["normal", "same", "not finite", "huge"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_page_is_drawn_from_what_is_there(rows: int, classes: int, width: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, width)).astype(np.float32)
    values = {
        "normal": values,
        "same": np.ones_like(values),
        "not finite": np.full_like(values, np.nan),
        "huge": values * np.float32(1e38),
    }[kind]
    identity = dataclasses.replace(IDENTITY, dimension=width, class_names=tuple("ab"[:classes]))
    data = EmbeddingSet(values, np.arange(rows, dtype=np.int64) % classes, SetMetadata(identity))
    page = render_page("x", data, inspect(data, rng), rng)
    assert page.count("data:image/png") == 3


def test_pictures_of_thousands_of_classes_and_sites_stay_of_a_size() -> None:
    import io

    from PIL import Image

    from embeddings.quality.pictures import class_balance

    many = [f"class {number}" for number in range(8141)]
    counts = np.arange(8141)[::-1]
    table = np.ones((200, 8141), dtype=np.int64)
    for png in (class_balance(counts.tolist(), many), who_has_what(table, [f"s{one}" for one in range(200)], many)):
        with Image.open(io.BytesIO(png)) as picture:
            assert max(picture.size) < 4_000
