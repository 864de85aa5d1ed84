"""`join`: a new site's own samples or model from a finished run, marked as not private, and near its records."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common.config.run import RunConfig
from common.loop import run_loop
from common.methods.constants import CENTRE
from common.methods.features import head_features
from common.methods.fedhypevae.joining import fit_code
from common.methods.mh_pfedhn import personal as mh_pfedhn
from common.methods.mh_pfedhn.architectures import Architecture
from common.publishing.bundle import load_bundle
from common.publishing.generator_file import write_generator
from common.publishing.parquet import read_notes
from common.records import SiteData
from deploy.classifier.file import load_head
from deploy.classifier.joining import STAYS
from embeddings.store.file import read_store
from embeddings.store.writing import write_store
from tests.deploy.report_cases import command
from tests.harness import CLASSES, make_identity, make_set


def _published(folder: Path, method: str, **changes: str | float | bool) -> Path:
    """A run of three made-up sites, and the generator's file that it publishes."""
    settings = {"method": method, "num_sites": 3, "num_rounds": 6, "epsilon": math.inf, "noise": "test",
                "clip_norm": math.inf, "code_dim": 2, "code_radius": 1.0, "chunk_size": 64, "hyper_rate": 0.01,
                "architectures": "linear,mlp-5", **changes}  # fmt: skip
    sets = [make_set(60, seed=at, task=RunConfig().replace(**settings).federation.task) for at in range(3)]
    sites = [SiteData(torch.from_numpy(one.embeddings), torch.from_numpy(one.labels)) for one in sets]
    result = run_loop(RunConfig().replace(**settings), sites, list(CLASSES))
    folder.mkdir(parents=True, exist_ok=True)
    write_generator(folder / "generator.safetensors", result.context, result.artifact, make_identity())
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = make_set(120, seed=9)
    splits = np.asarray(["train", "train", "validation", "test"])[np.arange(120) % 4]
    write_store(tmp_path / "own.parquet", dataclasses.replace(records, splits=splits))
    return tmp_path / "own.parquet"


def test_a_new_site_draws_with_its_own_code_and_the_file_says_that_it_stays(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = _published(tmp_path / "run", "fedhypevae"), tmp_path / "personal.parquet"
    assert command("join", run, "--data", data, "--out", out, "--rows", 90) == 0
    assert "NOT PRIVATE" in capsys.readouterr().out
    notes = read_notes(out)
    assert notes["private"] is False
    assert notes["not_private_because"][0] == STAYS
    assert notes["sampling"]["rows"] == 90
    assert command("join", run, "--data", data, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_code_is_fitted_to_training_rows_alone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, counts = _published(tmp_path / "run", "fedhypevae"), list[int]()

    def counted(context, artifact, rows, **options):  # type: ignore[no-untyped-def]
        counts.append(len(rows.labels))
        return fit_code(context, artifact, rows, steps=2)

    monkeypatch.setattr("deploy.classifier.joining.fit_code", counted)
    assert command("join", run, "--data", data, "--out", tmp_path / "a.parquet", "--rows", 9) == 0
    assert counts == [60]


@pytest.mark.parametrize("model", ["linear", "mlp-5"])
def test_a_new_site_gets_a_model_of_the_hypernetwork_that_predicts(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = _published(tmp_path / "run", "mh_pfedhn"), tmp_path / "own.safetensors"
    assert command("join", run, "--data", data, "--out", out, "--model", model) == 0
    shown = capsys.readouterr().out
    assert "on own test records" in shown
    trained, records = load_head(out), read_store(data)
    assert trained.own_rows == 60
    assert trained.not_private[0] == STAYS
    rows, labels = torch.from_numpy(records.embeddings), torch.from_numpy(records.labels)
    assert float((trained.probabilities(rows).argmax(1) == labels).double().mean()) > 0.6
    # what was saved is the generated model behind the run's own scaling and centring
    bundle = load_bundle(run)
    scaled = torch.nn.functional.normalize(rows, dim=1)
    kept = torch.from_numpy(records.splits == "train") if records.splits is not None else torch.ones(120) > 0
    widths = () if model == "linear" else (5,)
    architecture = Architecture(bundle.dim, widths, len(CLASSES))
    _, theta = mh_pfedhn.join(bundle.context, bundle.artifact, SiteData(scaled[kept], labels[kept]), architecture)
    features = head_features(bundle.context, rows, bundle.artifact.tensors[CENTRE])
    wanted = torch.softmax(architecture.logits(theta, features), 1)
    assert torch.allclose(trained.probabilities(rows), wanted, atol=1e-4)


def test_a_new_site_gets_a_model_of_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = _published(tmp_path / "run", "mh_pfedhn", task="multilabel"), tmp_path / "own.safetensors"
    records = make_set(120, seed=9, task="multilabel")
    write_store(tmp_path / "own.parquet", records)
    assert command("join", run, "--data", tmp_path / "own.parquet", "--out", out, "--model", "linear") == 0
    assert "AUROC" in capsys.readouterr().out
    trained = load_head(out)
    chances = trained.probabilities(torch.from_numpy(records.embeddings)).numpy()
    assert trained.task == "multilabel"
    for finding in range(len(CLASSES)):
        known = records.labels[:, finding] >= 0
        assert roc_auc_score(records.labels[known, finding], chances[known, finding]) > 0.8
    code = _published(tmp_path / "code", "fedhypevae", task="multilabel")
    assert command("join", code, "--data", tmp_path / "own.parquet", "--out", tmp_path / "x") == 2
    assert "one class a record" in " ".join(capsys.readouterr().err.split())
    write_store(tmp_path / "classes.parquet", make_set(60))
    assert command("join", run, "--data", tmp_path / "classes.parquet", "--out", tmp_path / "x") == 2
    assert "--task multilabel" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_join_refuses_what_the_run_has_not(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hyper = _published(tmp_path / "hyper", "mh_pfedhn")
    for model, said in (("mlp-500", "no head for models"), ("mlp-4-4", "linear or mlp-WIDTH"), ("tree", "linear")):
        assert command("join", hyper, "--data", data, "--out", tmp_path / "x", "--model", model) != 0
        assert said in " ".join(capsys.readouterr().err.split())
    gauss = _published(tmp_path / "gauss", "dp_gauss", num_rounds=0, statistics_share=0.5)
    assert command("join", gauss, "--data", data, "--out", tmp_path / "x") == 2
    assert "fedhypevae" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
