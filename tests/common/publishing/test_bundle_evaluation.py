"""Heads on one's own records and on a bundle: what a synthetic set that fits, or does not, is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from common.evaluation.ranking import Estimate
from common.evaluation.splits import split_by_unit
from common.publishing.bundle import Bundle
from common.publishing.worth import evaluate, prepared
from tests.common.publishing.test_bundle import MEANS, make


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path)


def records(count: int, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """One's own rows: the bundle's classes, twice as long as the unit sphere."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(count) % 3
    return 2 * (MEANS[labels] + spread * torch.randn(count, 6, generator=generator)), labels


def test_evaluate_scores_a_set_that_fits(bundle: Bundle) -> None:
    """All heads, all ways of training, get classes right that lie apart."""
    found = evaluate(bundle, *records(90), synthetic=bundle.draw(300))
    assert set(found.scores) == {"linear", "mlp", "knn"}
    assert found.train_rows + found.validation_rows + found.test_rows == 90
    assert found.commonest.balanced_accuracy == pytest.approx(1 / 3)
    for scores in found.scores.values():
        for name in ("local_only", "synthetic_only", "pooled", "mixed"):
            measured = getattr(scores, name)
            assert measured.accuracy == 1.0
            assert measured.auroc == Estimate(1.0)  # no interval: it would claim certainty
            assert measured.shown == 3


def test_evaluate_sees_a_set_that_does_not_fit(bundle: Bundle) -> None:
    """With the set's labels turned round, it alone is never right, and the mix learns to leave it out."""
    embeddings, labels = bundle.draw(300)
    scores = evaluate(bundle, *records(90), synthetic=(embeddings, (labels + 1) % 3), heads=["linear"]).scores["linear"]
    assert scores.synthetic_only.accuracy == 0.0
    assert scores.local_only.accuracy == scores.mixed.accuracy == 1.0
    assert scores.mixing >= 0.5


def test_evaluate_keeps_a_patient_on_one_side(bundle: Bundle) -> None:
    """Patients of five rows each: every part is made of whole patients, which parts of single rows are not."""
    embeddings, labels = records(12)
    rows, named = embeddings.repeat_interleave(5, 0), labels.repeat_interleave(5)
    rows = rows + 0.01 * torch.arange(60)[:, None]  # rows of their own: equal ones would be one unit
    groups = torch.arange(100, 112).repeat_interleave(5)
    more = {"synthetic": bundle.draw(6), "heads": ["linear"]}
    whole = evaluate(bundle, rows, named, groups=groups, **more)  # type: ignore[arg-type]
    assert (whole.train_rows, whole.validation_rows, whole.test_rows) == (35, 5, 20)
    assert sum(finding.patients for finding in whole.scores["linear"].local_only.findings) == 4
    single = evaluate(bundle, rows, named, **more)  # type: ignore[arg-type]
    assert single.train_rows != whole.train_rows
    parts = split_by_unit(rows.numpy(), None).reshape(12, 5)
    assert any(len(set(patient)) > 1 for patient in parts)


def test_evaluate_divides_rows_as_a_site_does_for_training(bundle: Bundle) -> None:
    """Else rows that the published set learned from would be among those that it is tested on."""
    rows, labels = records(90)
    by_site = split_by_unit(rows.numpy(), None)
    found = evaluate(bundle, rows, labels, synthetic=bundle.draw(30), heads=["linear"])
    given = evaluate(bundle, rows, labels, splits=by_site, synthetic=bundle.draw(30), heads=["linear"])
    assert found == given
    assert found.test_rows == (by_site == "test").sum()


def test_evaluate_takes_a_given_split_and_weight(bundle: Bundle) -> None:
    embeddings, labels = records(30)
    splits = ["train"] * 20 + ["test"] * 10
    found = evaluate(
        bundle, embeddings, labels, splits=splits, synthetic=bundle.draw(30), mixing=0.25, heads=["linear"]
    )
    assert (found.train_rows, found.validation_rows, found.test_rows) == (20, 0, 10)
    assert found.scores["linear"].mixing == 0.25


def test_prepared_scales_as_the_run_did(bundle: Bundle) -> None:
    rows, labels = prepared(bundle, *records(9))
    assert torch.allclose(rows.norm(dim=1), torch.ones(9))
    assert labels.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("wrong", ["width", "labels", "length", "split", "groups", "head", "few"])
def test_evaluate_refuses_what_does_not_fit(bundle: Bundle, wrong: str) -> None:
    embeddings, labels = records(30)
    more: dict[str, object] = {"synthetic": bundle.draw(9)}
    if wrong == "width":
        embeddings = embeddings[:, :5]
    elif wrong == "labels":
        labels = labels + 1
    elif wrong == "length":
        labels = labels[:-1]
    elif wrong == "split":
        more["splits"] = ["train"] * 30
    elif wrong == "groups":
        more["groups"] = torch.arange(29)
    elif wrong == "head":
        more["heads"] = ["forest"]
    else:
        embeddings, labels = embeddings[:1], labels[:1]
    with pytest.raises(ConfigError if wrong == "head" else DataError):
        evaluate(bundle, embeddings, labels, **more)  # type: ignore[arg-type]
