"""A run of findings, and one of grades, over Flower's messages: as in the plain loop, and what it publishes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_app.records import load_records, split_data
from common.config.run import RunConfig
from common.loop import run_context, run_loop
from common.methods import method_names
from common.methods.published import draw_published
from common.names import Task
from common.publishing.bundle import load_bundle
from common.publishing.parquet import check_layout, read_notes
from deploy.report.own import own_rows
from embeddings.store.writing import write_store
from tests.harness import CLASSES, SMALL, Federation, make_set
from tests.secagg_cases import keyed_federation
from tests.server_app.test_meeting import assert_nothing_happened
from tests.server_app.test_same_as_loop import assert_same_run

SETTINGS: dict[str, Any] = {"noise": "test", "num_rounds": 3, "synthetic_rows": 300}


def federation(home: Path, task: Task, sites: int = 4) -> Federation:
    sets = {index: make_set(60, seed=index, task=task, patients=True) for index in range(sites)}
    return keyed_federation(
        home,
        sites,
        sets=sets,
        allowed_methods=method_names(),
        allow_test_noise=True,
        data_is_public=True,
        metrics_may_leave=True,
    )


@pytest.mark.parametrize("trust", ["local", "secagg"])
@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
def test_a_run_gives_what_the_plain_loop_gives_and_publishes_its_rows(tmp_path: Path, task: Task, trust: str) -> None:
    over_flower = federation(tmp_path, task)
    summary = over_flower.run(task=task, trust=trust, **SETTINGS)
    assert summary["status"] == "completed"
    assert summary["config"]["task"] == task
    assert all(
        0.0 <= way[part] <= 1.0 for way in summary["scores"].values() for part in ("accuracy", "balanced_accuracy")
    )
    assert summary["scores"].keys() == {"local_only", "synthetic_only", "mixed", "own_lambda"}
    flat = {**SMALL, "num-sites": 4, "min-sites": 1, "task": task, "trust": trust}
    flat |= {name.replace("_", "-"): value for name, value in SETTINGS.items()}
    sites = [
        split_data(load_records(site.folder / "site.parquet", tmp_path), "train", "record")
        for site in over_flower.sites
    ]
    result = run_loop(RunConfig.from_flat(flat), sites, CLASSES)
    assert_same_run(over_flower, result)

    path = over_flower.output / "synthetic.parquet"
    check_layout(path, 12, CLASSES, task)
    assert read_notes(path)["task"] == task
    rows, labels = load_bundle(over_flower.output).published()
    drawn = draw_published(result.context, result.artifact)
    assert drawn is not None
    assert labels.dtype == drawn[1].dtype == (torch.int8 if task == "multilabel" else torch.int64)
    assert labels.shape == ((300, len(CLASSES)) if task == "multilabel" else (300,))
    assert rows.shape == (300, 12)
    statement = json.loads((over_flower.output / "privacy_statement.json").read_text())
    assert statement["mechanism"]["findings"]["task"] == task


@pytest.mark.parametrize("trust", ["local", "secagg"])
def test_sites_that_label_different_findings_meet_on_all_of_them(tmp_path: Path, trust: str) -> None:
    """In the order of their names; what a site does not label is unknown there, as in the plain loop."""
    own = [("liver", "lung"), ("lung", "spleen", "liver"), ("heart", "lung"), ("liver", "lung")]
    sets = {
        site: make_set(60, seed=site, task="multilabel", classes=names, patients=True) for site, names in enumerate(own)
    }
    allowed = {"allowed_methods": method_names(), "allow_test_noise": True, "data_is_public": True}
    ran = keyed_federation(tmp_path, 4, sets=sets, metrics_may_leave=True, **allowed)
    summary = ran.run(task="multilabel", trust=trust, **SETTINGS)
    assert summary["status"] == "completed"
    assert len(summary["scores"]) == 4
    bundle = load_bundle(ran.output)
    problem = bundle.context.problem
    assert bundle.class_names == problem.class_names == ("heart", "liver", "lung", "spleen")
    assert problem.label_sets == ((0, 2), (1, 2), (1, 2, 3))
    assert bundle.encoder is not None
    assert bundle.encoder.class_names == problem.class_names
    sites = [
        split_data(load_records(site.folder / "site.parquet", tmp_path), "train", "record", problem)
        for site in ran.sites
    ]
    assert [site.label_set for site in sites] == [1, 2, 0, 1]
    assert (sites[2].labels[:, [1, 3]] == -1).all()
    assert (sites[2].labels[:, [0, 2]] >= 0).any()
    assert_same_run(ran, run_context(bundle.context, sites))
    own_of_third = own_rows(load_records(ran.sites[2].folder / "site.parquet", tmp_path), bundle)
    assert (own_of_third.labels[:, [1, 3]] == -1).all()


def test_a_site_is_scored_by_the_names_of_its_findings_and_not_by_their_order(tmp_path: Path) -> None:
    """Two sites with the same records, whose files have the findings in another order, have the same scores."""
    given = make_set(60, seed=1, task="multilabel", patients=True)
    turned = replace(
        given,
        labels=np.ascontiguousarray(given.labels[:, ::-1]),
        metadata=replace(given.metadata, identity=replace(given.metadata.identity, class_names=CLASSES[::-1])),
    )
    assert turned.metadata.class_names == CLASSES[::-1]
    allowed = {"allowed_methods": method_names(), "allow_test_noise": True, "data_is_public": True}
    ran = keyed_federation(tmp_path, 2, sets={0: given, 1: turned}, metrics_may_leave=True, **allowed)
    seen: list[dict[str, float]] = []

    def watch(site: Any, message: Any, handler: Any) -> Any:
        reply = handler()
        if message.metadata.message_type == "evaluate":
            seen.append(dict(reply.content["scores"]))
        return reply

    ran.run(task="multilabel", tamper=watch, **SETTINGS)
    first, second = seen
    assert first == pytest.approx(second)


def test_a_findings_file_with_more_than_the_run_met_on_is_refused(tmp_path: Path) -> None:
    ran = federation(tmp_path, "multilabel", 2)

    def more_findings(site: Any, message: Any, handler: Any) -> Any:
        if site.name == "site-2" and message.metadata.message_type.endswith("statistics"):
            path = site.folder / "site.parquet"
            write_store(path, make_set(60, seed=9, task="multilabel", classes=(*CLASSES, "new"), patients=True))
        return handler()

    ran.run(task="multilabel", tamper=more_findings, **SETTINGS)
    assert ran.sites[1].entries() == 1
    assert "findings that the run does not" in ran.sites[1].log()


def test_further_rows_have_findings_too_and_are_asked_for_by_number_alone(tmp_path: Path) -> None:
    ran = federation(tmp_path, "multilabel")
    ran.run(task="multilabel", **SETTINGS)
    bundle = load_bundle(ran.output)
    rows, labels = bundle.draw(120, seed=4)
    assert rows.shape == (120, 12)
    assert labels.shape == (120, len(CLASSES))
    with pytest.raises(Exception, match="say how many rows"):
        bundle.draw(120, balance="dp-counts")


@pytest.mark.parametrize(
    ("method", "reason"), [("dp_cgan", "needs one class a record"), ("fedhypevae", "the run has multilabel")]
)
def test_what_can_not_learn_findings_ends_before_anything_is_charged(tmp_path: Path, method: str, reason: str) -> None:
    task: Task = "multilabel" if method == "dp_cgan" else "multiclass"
    refused = federation(tmp_path, task, 2)
    with pytest.raises(SystemExit) as stopped:
        refused.run(task="multilabel", method=method)
    assert stopped.value.code == 2
    assert reason in refused.status()["error"]
    assert len(refused.status()["error"].splitlines()) == 1
    assert_nothing_happened(refused)


def test_more_findings_than_a_run_may_have_end_it_before_anything_is_charged(tmp_path: Path) -> None:
    """Each site is within the limit, and all of them together are not."""
    names = [f"finding {number}" for number in range(514)]
    own = {0: tuple(names[:300]), 1: tuple(names[214:])}
    sets = {site: make_set(30, task="multilabel", classes=named) for site, named in own.items()}
    ran = Federation.create(tmp_path, 2, sets=sets)
    with pytest.raises(SystemExit):
        ran.run(task="multilabel")
    assert "label 514 findings, expected at most 512" in ran.status()["error"]
    assert_nothing_happened(ran)


def test_a_site_holds_the_runs_task_against_its_own_file(tmp_path: Path) -> None:
    """Whatever its hello said: a file of another task is refused where it lies, and nothing is charged."""
    ran = federation(tmp_path, "multilabel", 2)

    def another_file(site: Any, message: Any, handler: Any) -> Any:
        if site.name == "site-2" and message.metadata.message_type.endswith("statistics"):
            write_store(site.folder / "site.parquet", make_set(60, seed=9, patients=True))
        return handler()

    ran.run(task="multilabel", tamper=another_file, **SETTINGS)
    assert ran.sites[1].entries() == 1
    assert "the run has labels of a multilabel task" in ran.sites[1].log()


def test_findings_are_shown_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Prevalence of a set without noise is that of the records, finding by finding."""
    ran = federation(tmp_path, "multilabel", 2)
    ran.run(task="multilabel", epsilon=float("inf"), **{**SETTINGS, "synthetic_rows": 4000})
    data = [load_records(site.folder / "site.parquet", tmp_path).split("train").labels for site in ran.sites]
    labels = np.concatenate(data)
    share = [float((column[column >= 0] == 1).mean()) for column in labels.T]
    _, drawn = load_bundle(ran.output).published()
    # five standard errors of 4,000 rows, and what the offsets, found with 8,192 rows, and the caps add
    assert np.allclose((drawn == 1).float().mean(0).numpy(), share, atol=0.08)
