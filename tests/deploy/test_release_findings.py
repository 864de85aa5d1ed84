"""A bundle of findings: its rows, names and prevalence, as other libraries read them, and as `verify` holds them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from common.generator.label_tree import PRESENT
from common.publishing.bundle import GENERATOR, STATEMENT, load_bundle
from common.publishing.generator_file import write_generator
from common.publishing.parquet import set_notes, write_rows
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
    about = json.loads((findings.bundle / "bundle.json").read_text())
    counts = labels.sum(0).tolist()
    assert (about["task"], about["class_names"], about["class_counts"]) == ("multilabel", list(NAMES), counts)
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
        (lambda about: about.update(task="ordinal"), "descriptions"),
        (lambda about: about.pop("task"), "descriptions"),
        (lambda about: about["class_counts"].reverse(), "synthetic set"),
    ],
)
def test_a_bundle_that_says_other_of_its_findings_is_found(
    findings: Released, tmp_path: Path, change: Callable[[dict[str, Any]], object], check: str
) -> None:
    shutil.copytree(findings.bundle, tmp_path / "bundle")
    change_json(tmp_path / "bundle", "bundle.json", change)
    sign_again(tmp_path / "bundle", findings.key)
    done = invoke("release", "verify", tmp_path / "bundle")
    assert done.exit_code == 1
    assert any(check in name for name in failed_checks(done)), done.output


def _turned(bundle: Path) -> None:
    """Everything that the coordinator writes names the findings in another order, and is made again of it."""
    run = load_bundle(bundle)
    problem = replace(run.context.problem, class_names=NAMES[::-1])
    context = replace(run.context, problem=problem)
    encoder = None if run.encoder is None else replace(run.encoder, class_names=NAMES[::-1])
    write_generator(bundle / GENERATOR, context, run.artifact, encoder, run.not_private)
    _relabelled(bundle, torch.clone)
    change_json(bundle, "bundle.json", lambda about: about["class_names"].reverse())
    change_json(bundle, "bundle.json", lambda about: about["encoder"]["class_names"].reverse())


def _relabelled(bundle: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The set's file with other labels, and its counts with them."""
    run, path = load_bundle(bundle), bundle / DATA_FILE
    embeddings, labels = run.published()
    labels = change(labels)
    notes = {**set_notes(run.context, run.not_private)}
    write_rows(path, [(embeddings, labels)], dim=run.dim, class_names=run.class_names, notes=notes, task="multilabel")
    change_json(bundle, "bundle.json", lambda about: about.update(class_counts=labels.sum(0).tolist()))


def _one_label(labels: torch.Tensor) -> torch.Tensor:
    changed = labels.clone()
    changed[3, 1] = 1 - changed[3, 1]
    return changed


def _other_tree(bundle: Path) -> None:
    run = load_bundle(bundle)
    tensors = {**run.artifact.tensors, PRESENT: 1.0 - run.artifact.tensors[PRESENT]}
    write_generator(bundle / GENERATOR, run.context, replace(run.artifact, tensors=tensors), run.encoder)


def _said(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        text = (bundle / name).read_text()
        assert old in text
        (bundle / name).write_text(text.replace(old, new, 1))

    return change


CHANGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a label": (lambda bundle: _relabelled(bundle, _one_label), "drawn again"),
    "two findings swapped in each row": (lambda bundle: _relabelled(bundle, lambda y: y.flip(1)), "drawn again"),
    "the tree of findings": (_other_tree, "drawn again"),
    "a name": (_said("bundle.json", '"heart"', '"hearts"'), "configuration"),
    "the names everywhere": (_turned, "ledgers"),
    "prevalence on the card": (_said("README.md", " % |", "1 % |"), "descriptions"),
    "names in croissant": (_said("croissant.json", "heart, liver", "liver, heart"), "descriptions"),
    "the statement's task": (_said(STATEMENT, '"multilabel"', '"ordinal"'), "privacy statement"),
    "the statement's caps": (_said(STATEMENT, "findings present", "findings absent"), "privacy statement"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_bundle_of_findings_is_found_though_signed_again(
    findings: Released, tmp_path: Path, case: str
) -> None:
    shutil.copytree(findings.bundle, tmp_path / "bundle")
    change, check = CHANGED[case]
    change(tmp_path / "bundle")
    sign_again(tmp_path / "bundle", findings.key)
    done = invoke("release", "verify", tmp_path / "bundle")
    assert done.exit_code == 1
    assert re.search(rf"FAILED  .*{check}", done.output), done.output
