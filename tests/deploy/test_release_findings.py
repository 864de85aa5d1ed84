"""A bundle of findings: its rows, names and prevalence, as other libraries read them, and as `verify` holds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.publishing.bundle import load_bundle
from deploy.release.describe import DATA_FILE
from tests.deploy.conftest import Released
from tests.deploy.release_cases import change_json, failed_checks, invoke, release, run_federation, sign_again
from tests.deploy.test_release_libraries import run_python
from tests.harness import make_set

NAMES = ("heart", "liver", "lung")


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """Of two sites that label different findings. To be read only."""
    home = tmp_path_factory.mktemp("findings")
    own = (("lung", "liver"), ("heart", "lung"))
    sets = {site: make_set(60, seed=site, task="multilabel", classes=names) for site, names in enumerate(own)}
    federation = run_federation(home, sets, task="multilabel")
    done = release(federation.output, home / "bundle", home / "key.pem", "--ledgers", home)
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    return Released(federation.output, home, home / "bundle", home / "key.pem")


def test_rows_names_and_prevalence_of_findings_are_right(findings: Released) -> None:
    assert invoke("release", "verify", findings.bundle).exit_code == 0
    embeddings, labels = load_bundle(findings.bundle).published()
    table = pq.read_table(findings.bundle / DATA_FILE)
    assert table.schema.field("label").type == pa.list_(pa.int8(), 3)
    assert table["label"].to_pylist() == labels.tolist()
    assert np.isin(labels.numpy(), (0, 1)).all()
    told = json.loads((findings.bundle / "bundle.json").read_text())
    counts = labels.sum(0).tolist()
    assert (told["task"], told["class_names"], told["class_counts"]) == ("multilabel", list(NAMES), counts)
    card = (findings.bundle / "README.md").read_text()
    assert f"{len(embeddings)} synthetic embeddings of width 12 in 3 findings" in card
    for place, (name, count) in enumerate(zip(NAMES, counts, strict=True)):
        assert f"| {place} | {name} | {count} | {100 * count / len(labels):.1f} % |" in card


def test_datasets_and_croissant_read_findings(findings: Released, tmp_path: Path) -> None:
    code = """
from datasets import load_dataset
import mlcroissant
rows = load_dataset("parquet", data_files="data/*.parquet", split="train")
print(rows.features["label"].length, rows.features["label"].feature.dtype)
print([list(row) for row in rows["label"]])
dataset = mlcroissant.Dataset("croissant.json")
print(sorted(dataset.metadata.issues.errors), sorted(dataset.metadata.issues.warnings))
print([[int(one) for one in row["synthetic/label"]] for row in dataset.records("synthetic")])
"""
    labels = load_bundle(findings.bundle).published()[1].tolist()
    lines = run_python(code, findings.bundle, tmp_path).splitlines()
    assert lines == ["3 int8", str(labels), "[] []", str(labels)]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda told: told.update(task="ordinal"), "descriptions"),
        (lambda told: told.pop("task"), "descriptions"),
        (lambda told: told["class_counts"].reverse(), "synthetic set"),
    ],
)
def test_a_bundle_that_says_other_of_its_findings_is_found(
    findings: Released, tmp_path: Path, change: Callable[[dict[str, Any]], object], check: str
) -> None:
    import shutil

    shutil.copytree(findings.bundle, tmp_path / "bundle")
    change_json(tmp_path / "bundle", "bundle.json", change)
    sign_again(tmp_path / "bundle", findings.key)
    done = invoke("release", "verify", tmp_path / "bundle")
    assert done.exit_code == 1
    assert any(check in name for name in failed_checks(done)), done.output
