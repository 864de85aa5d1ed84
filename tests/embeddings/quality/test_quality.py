from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from common.wire.identity import EncoderIdentity
from embeddings.quality.pictures import who_has_what
from embeddings.quality.probe import FindingProbe, Probe, linear_probe
from embeddings.quality.quality import NEAR, inspect
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
    assert (quality.exact.count, quality.near.count) == (0, 0)
    assert quality.class_counts == tuple(np.bincount(data.labels))
    assert (quality.patients, quality.most_per_patient) == (300, 2)
    norms = np.linalg.norm(data.embeddings, axis=1)
    np.testing.assert_allclose(quality.norm_quantiles[2], np.median(norms), rtol=1e-5)
    assert isinstance(quality.probe, Probe)
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
    assert set(quality.exact.shown) == {(10, 50), (10, 51)}
    assert set(quality.near.shown) == expected
    assert len(expected) > 4


def test_inspect_finds_duplicates_across_labels_and_splits(data: EmbeddingSet, rng: np.random.Generator) -> None:
    splits = np.asarray(["train", "test"])[np.arange(600) % 2]
    data.embeddings[101] = data.embeddings[100]
    data.labels[100], data.labels[101] = 0, 1
    quality = inspect(dataclasses.replace(data, splits=splits), rng)
    assert (quality.conflicts.count, quality.leaks.count) == (1, 1)
    assert any("different labels" in line for line in quality.problems)
    assert any("different splits" in line for line in quality.problems)


def test_inspect_finds_one_image_under_two_patients_and_names_its_files(
    data: EmbeddingSet, rng: np.random.Generator
) -> None:
    data.embeddings[101], data.labels[101] = data.embeddings[100], data.labels[100]  # of one patient: in order
    assert inspect(data, rng).problems == ()
    data.embeddings[103], data.labels[103] = data.embeddings[7], data.labels[7]
    quality = inspect(data, rng, {7: "a/7.png", 103: "b\n.png"})
    assert (quality.strangers.count, quality.strangers.shown) == (1, ((7, 103),))
    (line,) = quality.problems
    assert line.startswith("1 pairs of equal or nearly equal rows belong to different patients")
    assert line.endswith("rows 7 (a/7.png) = 103 (b\\n.png)")


@pytest.fixture
def findings(data: EmbeddingSet, rng: np.random.Generator) -> EmbeddingSet:
    """A record has the finding of its class, every tenth the next one too; the last is unknown in every fourth."""
    labels = np.eye(3, dtype=np.int8)[data.labels]
    tenth = np.arange(600) % 10 == 0
    labels[tenth, (data.labels[tenth] + 1) % 3] = 1
    labels[::4, 2] = -1
    return dataclasses.replace(data, labels=labels, metadata=SetMetadata(IDENTITY, task="multilabel"))


def test_inspect_counts_findings(findings: EmbeddingSet, rng: np.random.Generator) -> None:
    quality = inspect(findings, rng)
    facts_of, labels = quality.findings, findings.labels
    assert quality.problems == ()
    assert facts_of is not None
    assert quality.class_counts == tuple((labels == 1).sum(axis=0))
    assert facts_of.unknown.tolist() == [0, 0, 150]
    assert facts_of.prevalence(2) == f"{(labels[:, 2] == 1).sum() / 450:.1%}"
    for i in range(3):
        for j in range(3):
            assert facts_of.together[i, j] == ((labels[:, i] == 1) & (labels[:, j] == 1)).sum()
    of_patient = [{int(k) for row in (2 * p, 2 * p + 1) for k in np.flatnonzero(labels[row] == 1)} for p in range(300)]
    assert facts_of.patients is not None
    assert facts_of.patients.tolist() == [sum(k in have for have in of_patient) for k in range(3)]
    assert facts_of.a_patient == tuple(np.bincount([len(have) for have in of_patient]))
    assert sum(facts_of.a_record) == 600
    assert isinstance(quality.probe, FindingProbe)
    assert quality.probe.auroc > 0.9
    lines = dict(facts(quality))
    assert lines["findings"] == "3 of 3 present"
    assert lines["unknown"] == "8.3% of all; most of d: 25.0%"
    assert f"a<b + c {facts_of.together[0, 1]}" in lines["found together"]
    assert lines["findings a record"].startswith("none ")
    page = render_page("x", findings, quality, rng)
    assert page.count('src="data:image/png;base64,') == 4
    assert "Found together" in page


def test_duplicates_that_do_not_know_a_finding_contradict_nothing(
    findings: EmbeddingSet, rng: np.random.Generator
) -> None:
    findings.embeddings[1] = findings.embeddings[0]
    findings.labels[0], findings.labels[1] = [1, 0, -1], [1, 0, 1]
    assert inspect(findings, rng).problems == ()
    findings.labels[1, 1] = 1
    assert inspect(findings, rng).conflicts.shown == ((0, 1),)
    findings.labels[5] = [1, 0, 2]
    assert inspect(findings, rng).outside_classes == (5,)


@pytest.mark.parametrize("rows", [0, 1, 2, 30])
def test_reports_of_few_and_of_many_findings(rows: int, rng: np.random.Generator) -> None:
    identity = dataclasses.replace(IDENTITY, dimension=4, class_names=tuple(f"finding {k}" for k in range(100)))
    labels = rng.integers(-1, 2, (rows, 100)).astype(np.int8)
    values = rng.standard_normal((rows, 4)).astype(np.float32)
    data = EmbeddingSet(values, labels, SetMetadata(identity, task="multilabel"))
    quality = inspect(data, rng)
    assert len(dict(facts(quality))["prevalence"]) < 1000
    assert render_page("x", data, quality, rng).count("data:image/png") == 4


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
    assert isinstance(probe, Probe)
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
