"""`evaluate`, `train` and `predict` as a site's people use them."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from common.errors import DataError
from common.evaluation.heads import LinearHead, fit_linear_head
from common.evaluation.scores import HEAD_SCALE, score
from common.publishing.bundle import load_bundle
from deploy.classifier.file import TrainedHead, load_head, save_head
from deploy.report.own import open_site, own_rows, site_rows
from deploy.report.site import render_site
from embeddings.encoders.efficientnet import offline_identity
from embeddings.store.file import read_store
from embeddings.store.writing import write_store
from tests.deploy.report_cases import command
from tests.harness import Federation, make_set

OVR: dict[str, Any] = {"multi_class": "ovr"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    made = Federation.create(tmp_path_factory.mktemp("published"), num_sites=2, records=90)
    made.run(num_rounds=1)
    return made


@pytest.fixture
def data(federation: Federation, tmp_path: Path) -> Path:
    """A site's set with its own split."""
    records = make_set(120, seed=5)
    splits = np.asarray(["train", "train", "validation", "test"])[np.arange(120) % 4]
    write_store(tmp_path / "own.parquet", dataclasses.replace(records, splits=splits))
    return tmp_path / "own.parquet"


def test_evaluate_prints_and_writes_what_the_heads_score(
    federation: Federation, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("evaluate", federation.output, "--data", data, "--json", tmp_path / "scores.json") == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    records = read_store(data)
    x = torch.nn.functional.normalize(torch.from_numpy(records.embeddings), dim=1)
    y, splits = torch.from_numpy(records.labels), records.splits
    assert splits is not None
    train, test = torch.from_numpy(splits == "train"), torch.from_numpy(splits == "test")
    by_hand = score(fit_linear_head(x[train], y[train], 3), x[test], y[test])
    local = found["scores"]["linear"]["local_only"]
    assert local["accuracy"] == by_hand.accuracy
    assert local["balanced_accuracy"] == by_hand.balanced_accuracy
    assert (found["train_rows"], found["test_rows"], found["synthetic_rows"]) == (60, 30, 60)
    shown = capsys.readouterr().out
    assert f"{100 * by_hand.accuracy:.1f}/{100 * by_hand.balanced_accuracy:.1f}" in shown
    for word in ("own data", "synthetic", "both in one training", "two classifiers, mixed", "nearest neighbours"):
        assert word in shown
    assert "keep them here" in shown
    assert "the commonest answer" in shown
    area = roc_auc_score(y[test], torch.softmax(fit_linear_head(x[train], y[train], 3).logits(x[test]), 1), **OVR)
    assert local["auroc"]["value"] == pytest.approx(area, abs=1e-6)
    assert f"{area:.3f}" in shown
    assert local["findings"][0]["positives"] == int((y[test] == 0).sum())


def test_evaluate_and_a_site_s_page_give_the_same_scores_for_a_file_without_splits(
    federation: Federation, tmp_path: Path
) -> None:
    """Both divide it as the site did for training."""
    site, bundle = federation.sites[0], load_bundle(federation.output)
    read = own_rows(read_store(site.folder / "site.parquet"), bundle)
    assert read.records.splits is None
    assert command("evaluate", federation.output, "--data", site.folder / "site.parquet", "--json", tmp_path / "s") == 0
    place = open_site(site.folder, bundle)
    assert list(site_rows(place, bundle).splits) == list(read.splits)
    page = html.unescape(render_site(place, bundle, {}, umap=False))
    for scores in json.loads((tmp_path / "s").read_text())["scores"].values():
        for way in ("local_only", "synthetic_only", "pooled", "mixed"):
            cell = f"{100 * scores[way]['accuracy']:.1f}/{100 * scores[way]['balanced_accuracy']:.1f}"
            assert re.search(rf"{re.escape(cell)}</td>\s*<td[^>]*>{scores[way]['auroc']['value']:.3f}", page)


def test_evaluate_refuses_other_heads_and_other_encoders(
    federation: Federation, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("evaluate", federation.output, "--data", data, "--heads", "linear,forest") == 2
    assert "forest" in capsys.readouterr().err
    records = make_set(60)
    identity = dataclasses.replace(records.metadata.identity, preprocessing="another")
    other = dataclasses.replace(records, metadata=dataclasses.replace(records.metadata, identity=identity))
    write_store(tmp_path / "other.parquet", other)
    assert command("evaluate", federation.output, "--data", tmp_path / "other.parquet") == 2
    assert "preprocessing is another" in " ".join(capsys.readouterr().err.split())
    assert command("evaluate", tmp_path, "--data", data) == 2


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_train_saves_a_classifier_that_loads_as_it_was(federation: Federation, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "head.safetensors"
    assert command("train", federation.output, "--out", out, "--head", kind) == 0
    trained, bundle = load_head(out), load_bundle(federation.output)
    assert (trained.class_names, trained.encoder) == (bundle.class_names, bundle.encoder)
    assert (trained.own_rows, trained.not_private) == (0, ())
    rows = torch.from_numpy(make_set(40, seed=9).embeddings)
    found = trained.probabilities(rows)
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    torch.testing.assert_close(trained.probabilities(3.0 * rows), found)  # scaled to unit length first
    if kind == "linear":
        by_hand = fit_linear_head(*bundle.published(), num_classes=3).scaled(HEAD_SCALE)
        torch.testing.assert_close(found, by_hand.probabilities(torch.nn.functional.normalize(rows, dim=1)))


def test_train_with_own_records_says_that_it_stays(
    federation: Federation, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.safetensors"
    assert command("train", federation.output, "--out", out, "--data", data) == 0
    shown = capsys.readouterr().out
    assert "stays at the site" in shown
    trained = load_head(out)
    assert trained.own_rows == 60  # of its 120 rows, those to train on
    assert "on own test records" in shown
    records = read_store(data)
    test = np.asarray(records.splits == "test")
    chances = trained.probabilities(torch.from_numpy(records.embeddings))[torch.from_numpy(test)]
    assert f"{roc_auc_score(records.labels[test], chances, **OVR):.3f}" in shown


def test_load_head_refuses_what_is_no_classifier(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no classifier at"):
        load_head(tmp_path / "none")
    with pytest.raises(DataError, match="no classifier of this project"):
        load_head(federation.output / "generator.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="can't be read"):
        load_head(tmp_path / "text")
    save_head(tmp_path / "head", TrainedHead(LinearHead(torch.eye(3), torch.zeros(3)), ("a", "b"), None, "r"))
    with pytest.raises(DataError, match="names 2 classes"):
        load_head(tmp_path / "head")
    save_file({"weight": torch.eye(2)}, tmp_path / "part", {"format": "fedhypevae-head/1", "kind": "linear"})
    with pytest.raises(DataError, match="train it again"):
        load_head(tmp_path / "part")
    assert command("train", federation.output, "--out", tmp_path / "x", "--head", "knn") == 2
    assert not (tmp_path / "x").exists()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_predict_names_the_classes_of_one_image_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    from embeddings.encoders.load import load_encoder

    pixels = np.random.default_rng(0).integers(0, 256, (90, 130), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    weight = torch.randn(3, 1280, generator=torch.Generator().manual_seed(0))
    identity = offline_identity(("a", "b", "c"))
    save_head(tmp_path / "head", TrainedHead(LinearHead(weight, torch.zeros(3)), ("a", "b", "c"), identity, "r"))
    assert command("predict", tmp_path / "head", tmp_path / "scan.png", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    vector = torch.from_numpy(load_encoder("efficientnet-lite0").embed([pixels]))
    expected = torch.softmax(torch.nn.functional.normalize(vector, dim=1) @ weight.T, dim=1)[0].tolist()
    assert [found[name] for name in "abc"] == pytest.approx(expected, abs=2e-4)
    assert list(found) == sorted(found, key=lambda name: -found[name])
    assert command("predict", tmp_path / "head", tmp_path / "scan.png") == 0
    assert f"{100 * found['a']:.1f} %" in capsys.readouterr().out
    assert command("predict", tmp_path / "head", tmp_path / "none.png") == 2
    assert command("predict", tmp_path / "head", tmp_path / "head") == 2
    other = dataclasses.replace(identity, weights_digest="0" * 64)
    save_head(tmp_path / "other", TrainedHead(LinearHead(weight, torch.zeros(3)), ("a", "b", "c"), other, "r"))
    assert command("predict", tmp_path / "other", tmp_path / "scan.png") == 2
    assert "weights_digest" in capsys.readouterr().err


def test_predict_refuses_a_classifier_that_names_no_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_head(tmp_path / "head", TrainedHead(LinearHead(torch.eye(2), torch.zeros(2)), ("a", "b"), None, "r"))
    assert command("predict", tmp_path / "head", tmp_path / "x.png") == 2
    assert "names no encoder" in capsys.readouterr().err
