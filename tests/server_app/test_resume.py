"""A run killed in mid-round and resumed: the rounds asked for, and no site's spent budget lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.harness import Federation, Killed


def kill_server_at(round_number: int, after: int) -> Any:
    """A network on which the server dies in a round, when `after` sites have answered."""
    seen = []

    def tamper(site: Any, message: Any, handler: Any) -> Any:
        if message.metadata.group_id == f"round-{round_number}":
            if len(seen) == after:
                raise SystemExit(137)
            seen.append(site.name)
        return handler()

    return tamper


def test_run_killed_in_mid_round_resumes_to_the_end(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=3)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=4, tamper=kill_server_at(3, after=2))
    before = {site.name: next(iter(site.runs().values())).charged for site in federation.sites}
    summary = federation.run(num_rounds=4, resume=True, run_id=2)
    assert summary["rounds"] == 4
    assert [len(sites) for sites in summary["rounds_taken_part"]] == [3, 3, 3, 3]
    for site in federation.sites:
        (run,) = site.runs().values()  # the resumed run is the same run to the ledger
        assert run.charged[: len(before[site.name])] == before[site.name]
        assert sum(event.count for event in run.charged) == 1 + 4  # statistics and rounds: nothing was charged twice
    assert all(spent <= 3.0 for spent in summary["privacy"]["epsilon_spent_per_site"].values())


def test_site_killed_between_charge_and_release_pays_with_a_spare_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client_app.ledger.ledger import Ledger

    federation = Federation.create(tmp_path, num_sites=2)
    real, died = Ledger.commit, []

    def commit(ledger: Ledger, reservation: Any, digest: str) -> Any:
        if reservation.round_key == "round-2" and not died:
            died.append(reservation)
            raise Killed(137)
        return real(ledger, reservation, digest)

    monkeypatch.setattr(Ledger, "commit", commit)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=3, min_sites=2)  # the round falls short of min-sites, and the run stops
    summary = federation.run(num_rounds=3, min_sites=2, resume=True, run_id=2)
    assert summary["rounds"] == 3
    runs = [next(iter(site.runs().values())) for site in federation.sites]
    assert sorted(sum(event.count for event in run.charged) for run in runs) == [1 + 3, 1 + 4]
    assert all(spent <= 3.0 for spent in summary["privacy"]["epsilon_spent_per_site"].values())


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=2)
    federation.run(num_rounds=2)
    federation.interrupt()
    with pytest.raises(SystemExit) as stopped:
        federation.run(num_rounds=2, epsilon=2.0, resume=True, run_id=2)
    assert stopped.value.code == 2
    assert "other settings" in federation.status()["error"]


def test_resume_without_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=2)
    with pytest.raises(SystemExit) as stopped:
        federation.run(resume=True)
    assert stopped.value.code == 2
    assert "no checkpoint" in federation.status()["error"]


def test_resume_from_a_checkpoint_of_another_version_is_one_clear_line(tmp_path: Path) -> None:
    """As when parameters still travelled in few bits: the file also held what the sites had."""
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=1)
    federation.interrupt()
    path = federation.output / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    save_file({**load_file(path), "held/all/centre": torch.zeros(1)}, path, notes)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1, resume=True)
    assert "of another version" in federation.status()["error"]


@pytest.mark.parametrize("change", [{"round": 5}, {"round": "1"}, {"charged": {"site-1": "["}}])
def test_resume_from_a_checkpoint_that_contradicts_itself_is_one_clear_line(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    federation = Federation.create(tmp_path, 1)
    federation.run(num_rounds=1)
    federation.interrupt()
    path = federation.output / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        notes = json.loads(file.metadata()["notes"])
    (notes["progress"] if "charged" in change else notes).update(change)
    save_file(load_file(path), path, {"notes": json.dumps(notes)})
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1, resume=True)
    assert "it is damaged" in federation.status()["error"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("settings", [{}, {"resume": True}, {"epsilon": 0.0}], ids=["again", "resumed", "refused"])
def test_nothing_is_written_to_a_completed_runs_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    federation = Federation.create(tmp_path, num_sites=2)
    federation.run(num_rounds=1)
    before = files_of(federation.output)
    charged = [site.entries() for site in federation.sites]
    with pytest.raises(SystemExit) as stopped:
        federation.run(num_rounds=1, output_dir=federation.folder, run_id=2, **settings)
    assert stopped.value.code == 2
    assert files_of(federation.output) == before
    assert [site.entries() for site in federation.sites] == charged
    said = capsys.readouterr().out
    assert "epsilon" in said if "epsilon" in settings else "complete" in said


def test_a_run_that_met_no_site_leaves_its_folder_free(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, num_sites=1)
    federation.absent.add(federation.sites[0].node)
    with pytest.raises(SystemExit):
        federation.run(num_rounds=1, round_timeout=0.2)
    federation.absent.clear()
    assert federation.run(num_rounds=1, output_dir=federation.folder)["status"] == "completed"
