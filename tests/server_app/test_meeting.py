"""Sites that do not agree, or are too few, end a run before anything is charged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from server_app.register import REGISTER
from tests.harness import Federation, make_set

CASES = {
    "width": ({1: make_set(60, dim=9)}, "dimension"),
    "task": ({1: make_set(60, task="multilabel")}, "task is multilabel, the run has multiclass"),
    "classes": ({1: make_set(60, classes=("liver", "lung", "heart"))}, "class_names"),
}


@pytest.mark.parametrize("case", CASES)
def test_sites_that_differ_are_named_with_the_field(tmp_path: Path, case: str) -> None:
    sets, field = CASES[case]
    federation = Federation.create(tmp_path, num_sites=2, sets=sets)
    with pytest.raises(SystemExit) as stopped:
        federation.run()
    assert stopped.value.code == 2
    error = federation.status()["error"]
    assert len(error.splitlines()) == 1
    assert field in error
    assert "site-2" in error
    assert_nothing_happened(federation)


def test_site_without_records_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    """Rows that can't be used are left out at the site (test_unusable_rows); a file that is not there can't be."""
    federation = Federation.create(tmp_path, num_sites=2)
    (federation.sites[1].folder / "site.parquet").unlink()
    with pytest.raises(SystemExit) as stopped:
        federation.run()
    assert stopped.value.code == 2
    error = federation.status()["error"]
    assert "expected 2 sites, 1 said hello" in error
    assert "refused: data (reference" in error
    assert "no embeddings at" in federation.sites[1].log().split("DataError")[-1]
    assert "no embeddings at" not in error  # what the data holds stays at the site
    assert_nothing_happened(federation)


def test_site_that_lacks_classes_takes_part(tmp_path: Path) -> None:
    records = make_set(60)
    some = records.take(np.flatnonzero(records.labels != 1))
    summary = Federation.create(tmp_path, num_sites=2, sets={1: some}).run(num_rounds=1)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]]


def assert_nothing_happened(federation: Federation) -> None:
    """No charge at any site, and nothing that looks like a result."""
    assert all(site.entries() == 1 for site in federation.sites)
    assert sorted(path.name for path in federation.output.iterdir()) == ["status.json"]


def test_fewer_sites_than_asked_for_is_one_clear_line(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=2)
    with pytest.raises(SystemExit) as stopped:
        federation.run(num_sites=3, round_timeout=0.2)
    assert stopped.value.code == 2
    assert_nothing_happened(federation)
    assert "expected 3 sites, 2 are connected" in federation.status()["error"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"latnt_dim": 3}, "did you mean latent-dim"),
        ({"statistics_share": 0.0}, "public-total"),
        ({"num_rounds": 1, "min_sites": 9}, "min-sites"),
        ({"method": "magic"}, "unknown method"),
    ],
)
def test_wrong_setting_ends_with_code_2_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: str
) -> None:
    federation = Federation.create(tmp_path, num_sites=2)
    with pytest.raises(SystemExit) as stopped:
        federation.run(**settings)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().out
    assert not (federation.output / "summary.json").exists()
    assert not federation.traffic or not federation.sent(kind="train")


def spoiled(reply: Message, change: str) -> Message:
    """A training reply with one thing wrong."""
    tensors = reply.content.array_records["tensors"].to_torch_state_dict()
    name = sorted(tensors)[0]
    if change == "name":
        tensors["surprise"] = tensors.pop(name)
    elif change == "shape":
        tensors[name] = tensors[name].flatten()[:1]
    elif change == "dtype":
        tensors[name] = tensors[name].double()
    elif change == "nan":
        tensors[name] = tensors[name] * float("nan")
    words = dict(reply.content.config_records["words"])
    if change == "word":
        words["loss"] = 0.3
    content = RecordDict({"words": ConfigRecord(words), "tensors": ArrayRecord(tensors)})
    reply.content.clear()
    reply.content.update(content)
    return reply


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "nan", "word"])
def test_garbage_reply_is_not_used(tmp_path: Path, change: str) -> None:
    federation = Federation.create(tmp_path, num_sites=3)

    def tamper(site: Any, message: Message, handler: Any) -> Message:
        reply = handler()
        return spoiled(reply, change) if site.name == "site-2" and message.metadata.message_type == "train" else reply

    summary = federation.run(min_sites=2, tamper=tamper)
    assert summary["rounds_taken_part"] == [["site-1", "site-3"]] * 2
    assert all("site-2" in missing for missing in summary["rounds_missing"])


def test_late_site_is_missing_and_the_round_goes_on(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=3)

    def tamper(site: Any, message: Message, handler: Any) -> Message | None:
        late = site.name == "site-3" and message.metadata.group_id == "round-1"
        return None if late else handler()

    summary = federation.run(min_sites=2, round_timeout=1.0, tamper=tamper)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"], ["site-1", "site-2", "site-3"]]
    assert "in time" in summary["rounds_missing"][0]["site-3"]


def test_run_asks_the_sites_that_were_chosen_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another that is connected is not greeted, at the start or later."""
    federation = Federation.create(tmp_path, 3)
    register = tmp_path / "sites.json"
    listed = [{"node_id": str(one.node), "name": one.name, "status": "registered"} for one in federation.sites]
    register.write_text(json.dumps(listed))
    monkeypatch.setenv(REGISTER, str(register))
    summary = federation.run(num_rounds=2, num_sites=2, sites="site-1, site-3")
    assert summary["rounds_taken_part"] == [["site-1", "site-3"]] * 2
    assert {seen.site for seen in federation.traffic} == {"site-1", "site-3"}
    assert federation.site("site-2").entries() == 1
    with pytest.raises(SystemExit) as stopped:
        federation.run(num_rounds=1, num_sites=1, sites="site-1,site-9")
    assert stopped.value.code == 2
    assert "sites names site-9" in federation.status()["error"]
