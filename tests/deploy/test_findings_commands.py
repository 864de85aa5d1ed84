"""`evaluate`, `train`, `predict` and the pages on a run of findings, and on one of grades."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from common.evaluation.clinical import grade_probabilities
from common.evaluation.heads import LinearHead, fit_linear_head
from common.names import Task
from common.publishing.bundle import load_bundle
from common.records import cumulative
from deploy.classifier.file import TrainedHead, load_head, save_head
from deploy.report.own import as_classes, own_rows
from embeddings.encoders.efficientnet import offline_identity
from embeddings.store.file import read_store
from tests.deploy.report_cases import command
from tests.harness import CLASSES, Federation, make_set


@pytest.fixture(scope="module", params=["multilabel", "ordinal"])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Task]:
    task: Task = request.param
    sets = {index: make_set(150, seed=index, task=task, patients=True) for index in range(2)}
    made = Federation.create(tmp_path_factory.mktemp(task), num_sites=2, sets=sets)
    made.run(num_rounds=1, task=task, synthetic_rows=200)
    return made, task


def test_evaluate_scores_each_finding_where_it_is_known(
    ran: tuple[Federation, Task], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation, task = ran
    file = federation.sites[0].folder / "site.parquet"
    assert command("evaluate", federation.output, "--data", file, "--json", tmp_path / "scores.json") == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert set(found["scores"]) == {"linear", "mlp", "knn"}
    local = found["scores"]["linear"]["local_only"]
    own = own_rows(read_store(file), load_bundle(federation.output))
    (x, y), (unseen, truth) = own.split("train"), own.split("test")
    findings = y if task == "multilabel" else cumulative(y, len(CLASSES))
    answers = truth if task == "multilabel" else cumulative(truth, len(CLASSES))
    chances = fit_linear_head(x, findings, findings.shape[1]).probabilities(unseen)
    for at, finding in enumerate(local["findings"]):
        known = answers[:, at] >= 0
        assert finding["positives"] + finding["negatives"] == int(known.sum())
        assert finding["patients"] < finding["positives"]
        expected = roc_auc_score(answers[known, at], chances[known, at])
        assert finding["auroc"]["value"] == pytest.approx(expected, abs=1e-6)
    shown = capsys.readouterr().out
    assert f"{local['auroc']['value']:.3f}" in shown
    if task == "ordinal":
        kappa = cohen_kappa_score(truth, (chances > 0.5).sum(1), weights="quadratic")
        assert local["kappa"] == pytest.approx(kappa)
        assert f"{kappa:.3f}" in shown
        assert [finding["name"] for finding in local["findings"]] == [f"{name} or higher" for name in CLASSES[1:]]
    else:
        assert local["kappa"] is None
        assert found["commonest"]["balanced_accuracy"] == 0.5


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_train_saves_a_classifier_of_findings_that_loads_as_it_was(
    ran: tuple[Federation, Task], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    federation, task = ran
    out, file = tmp_path / "head", federation.sites[0].folder / "site.parquet"
    assert command("train", federation.output, "--out", out, "--head", kind, "--data", file) == 0
    assert "on own test records" in capsys.readouterr().out
    trained = load_head(out)
    assert (trained.task, trained.class_names) == (task, CLASSES)
    chances = trained.probabilities(torch.from_numpy(make_set(20, seed=9).embeddings))
    assert chances.shape == (20, 3 if task == "multilabel" else 2)
    assert not torch.allclose(chances.sum(1), torch.ones(20))  # answers of their own, no shares of one


def test_pages_show_findings_and_grades(ran: tuple[Federation, Task]) -> None:
    federation, task = ran
    site = federation.sites[0]
    assert command("report", federation.output) == 0
    assert command("site", "report", site.folder, "--bundle", federation.output, "--no-umap") == 0
    page = html.unescape((site.folder / "report.html").read_text())
    assert "sensitivity at 95 % specificity" in page
    assert ("quadratic kappa" in page) == (task == "ordinal")
    assert ("none known" in page) == (task == "multilabel")


def test_predict_gives_a_probability_to_each_finding_or_grade(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    names, found = ("a", "b", "c"), {}
    kinds: tuple[tuple[Task, int], ...] = (("multilabel", 3), ("ordinal", 2))
    for task, outputs in kinds:
        head = LinearHead(torch.zeros(outputs, 1280), torch.tensor([1.0, -1.0, 0.5])[:outputs], findings=True)
        save_head(tmp_path / task, TrainedHead(head, names, offline_identity(names), "r", task=task))
        assert command("predict", tmp_path / task, tmp_path / "scan.png", "--json") == 0
        found[task] = json.loads(capsys.readouterr().out)
    first, second, third = torch.sigmoid(torch.tensor([1.0, -1.0, 0.5])).tolist()
    assert found["multilabel"] == pytest.approx({"a": first, "b": second, "c": third}, abs=1e-5)
    assert found["ordinal"] == pytest.approx({"a": 1 - first, "b": first - second, "c": second}, abs=1e-5)
    assert command("predict", tmp_path / "ordinal", tmp_path / "scan.png") == 0
    assert "grade" in capsys.readouterr().out


def test_grades_have_probabilities_that_sum_to_one_even_where_thresholds_contradict() -> None:
    reached = torch.tensor([[0.9, 0.4], [0.2, 0.6]])  # the second says: rather severe than mild
    expected = torch.tensor([[0.1, 0.5, 0.4], [0.8, 0.0, 0.2]])
    torch.testing.assert_close(grade_probabilities(reached), expected)


def test_a_row_of_several_findings_is_shown_under_its_rarest() -> None:
    labels = torch.tensor([[1, 1, 0], [1, 0, -1], [0, -1, 0], [1, 0, 1], [1, 1, 1]], dtype=torch.int8)
    shown, names = as_classes(labels, ("x", "y", "z"))
    assert shown.tolist() == [1, 0, 3, 2, 1]  # of equals, y and z, the first
    assert names == ("x", "y", "z", "none known")
    assert as_classes(labels[:1], ("x", "y", "z"), counted=labels[:2])[0].tolist() == [1]
    classes = torch.tensor([2, 0])
    assert as_classes(classes, ("x", "y", "z"))[0] is classes
