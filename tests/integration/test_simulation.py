"""`flwr run` in simulation, with the settings that people change; on the demonstration's own images."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.config.presets import resolve
from common.errors import ConfigError
from common.methods import get_method, method_names
from common.publishing.bundle import load_bundle
from deploy.machine.app_package import staged_app
from deploy.simulation.simulate import simulate
from embeddings.store.writing import write_store
from tests.harness import make_set
from tests.integration import every_method_app
from tests.server_app.test_every_method import ONE_SHOT

ROOT = Path(__file__).resolve().parents[2]
CACHE = str(ROOT / "outputs" / "cache")  # shared with `make demo`: the images are embedded once
QUICK = {"num-sites": 2, "min-sites": 2, "num-rounds": 3, "synthetic-rows": 220}
pytestmark = [pytest.mark.simulation, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("FEDHYPEVAE_CACHE", CACHE)
    return tmp_path_factory.mktemp("work")


def run(work: Path, name: str, settings: dict[str, Any], app_folder: Path = ROOT) -> Path:
    return simulate(resolve({**QUICK, "output-dir": name, **settings}), work_folder=work, app_folder=app_folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 1.0, "alpha": 0.3, "encoder-training": "joint"},
        {"trust": "secagg", "num-sites": 4, "epsilon": 1.0},
    ],
    ids=["joint", "secagg"],
)
def test_flwr_run_completes_with_other_settings(
    work: Path, request: pytest.FixtureRequest, settings: dict[str, Any]
) -> None:
    output = run(work, request.node.callspec.id, settings)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["rounds"] == 3
    assert summary["privacy"]["encoder_training"] == settings.get("encoder-training", "sleep")
    assert summary["privacy"]["end_to_end"] is True
    assert summary["config"].items() >= settings.items()
    assert all(0.0 <= scores["accuracy"] <= 1.0 for scores in summary["scores"].values())


def test_every_method_runs_three_rounds_under_flwr_run(work: Path) -> None:
    """One `flwr run` for all of them, over a small pool; and what the paper prints, which ends without a guarantee."""
    write_store(work / "pool.parquet", make_set(240))
    settings = {"pool": "pool.parquet", "data-is-public": True, "synthetic-rows": 60, "encoder-width": 8}
    with staged_app(ROOT) as staged:
        shutil.copy(every_method_app.__file__, staged / "server_app" / "every_method_app.py")
        project = (staged / "pyproject.toml").read_text()
        changed = project.replace('serverapp = "server_app.app:app"', 'serverapp = "server_app.every_method_app:app"')
        assert changed != project
        (staged / "pyproject.toml").write_text(changed)
        output = run(work, "methods", settings, staged)
    for name in (*method_names(), *every_method_app.OTHERS):
        summary = json.loads((output / name / "summary.json").read_text())
        method = summary["method"]
        assert method == (name if name in method_names() else "fedhypevae")
        assert summary["status"] == "completed"
        rounds = 0 if method in ONE_SHOT else 3
        assert summary["rounds"] == rounds, name
        assert summary["rounds_taken_part"] == [["site-1", "site-2"]] * rounds, name
        assert summary["config"].items() >= every_method_app.OTHERS.get(name, {}).items()
        assert summary["privacy"]["end_to_end"] is (get_method(method).private and name != "unprotected"), name
        assert all(0.0 <= scores["accuracy"] <= 1.0 for scores in summary["scores"].values())


def test_failing_run_fails_the_command(work: Path) -> None:
    """A run whose server refuses must not end as if all were well: `flwr run --stream` itself exits 0."""
    with pytest.raises(ConfigError, match="no checkpoint"):
        run(work, "nothing-there", {"resume": True})


def test_flwr_run_of_findings_completes_with_a_set_of_findings(work: Path) -> None:
    write_store(work / "findings.parquet", make_set(240, task="multilabel", patients=True))
    settings = {"pool": "findings.parquet", "task": "multilabel", "data-is-public": True, "unit": "patient"}
    output = run(work, "findings", settings)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["privacy"]["end_to_end"] is True
    rows, labels = load_bundle(output).published()
    assert labels.shape == (len(rows), 3) == (220, 3)
    assert set(labels.unique().tolist()) <= {0, 1}
