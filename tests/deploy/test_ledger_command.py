"""`fedhypevae ledger`: every subcommand on a real ledger, its exit code and its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from client_app.ledger.ledger import Ledger
from client_app.ledger.limits import BudgetLimits
from client_app.release.log import ReleaseLog
from common.errors import LedgerError
from common.privacy.events import gaussian
from deploy.cli import app

LIMITS = BudgetLimits(lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=2.0)
DIGEST = "ab" * 32


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with a ledger of one run, one released round, its witness and its release log."""
    with Ledger.create(tmp_path / "ledger.db", "cohort-1", tmp_path / "witness.json") as ledger:
        ledger.declare_run("spring", (gaussian(20.0, count=10),), LIMITS, fingerprint="f")
        reservation = ledger.reserve("spring", "round-1", [gaussian(20.0)], limits=LIMITS, fingerprint="f")
        ledger.commit(reservation, DIGEST)
    ReleaseLog(tmp_path / "releases.jsonl").append("spring", "round-1", [], DIGEST, 10)
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "150"}).invoke(app, ["ledger", *map(str, arguments)])


def error_of(*arguments: object) -> str:
    result = call(*arguments)
    assert isinstance(result.exception, LedgerError), result.output
    return str(result.exception)


def test_show_prints_runs_and_what_is_left(site: Path) -> None:
    result = call("show", site / "ledger.db", "--witness", site / "witness.json")
    assert result.exit_code == 0, result.output
    for part in ("cohort-1", "spring", "0.16 ", "0.5613", "open", "add", "epsilon 3 at delta 1e-05"):
        assert part in result.output, result.output


def test_verify_checks_chain_witness_receipt_and_log(site: Path) -> None:
    with Ledger.open(site / "ledger.db", "cohort-1") as ledger:
        receipt = ledger.head
    options = ["--witness", site / "witness.json", "--receipt", receipt, "--log", site / "releases.jsonl"]
    result = call("verify", site / "ledger.db", *options)
    assert result.exit_code == 0, result.output
    assert f"receipt {receipt}" in result.output
    assert "1 releases, all committed" in result.output
    assert "rolled back" in error_of("verify", site / "ledger.db", "--receipt", f"99:{DIGEST}")
    ReleaseLog(site / "releases.jsonl").append("spring", "round-2", [], "cd" * 32, 10)
    assert "never committed" in error_of("verify", site / "ledger.db", "--log", site / "releases.jsonl")


def test_export_writes_every_entry(site: Path) -> None:
    assert call("export", site / "ledger.db", site / "ledger.json").exit_code == 0
    content = json.loads((site / "ledger.json").read_text())
    assert [entry["kind"] for entry in content["entries"]] == ["genesis", "declare", "reserve", "commit"]
    assert content["head"]["seq"] == 4
    assert call("export", site / "ledger.db", site / "ledger.json").exit_code != 0


def test_backup_put_back_is_a_rollback(site: Path) -> None:
    assert call("backup", site / "ledger.db", site / "backup.db").exit_code == 0
    assert call("close", site / "ledger.db", "spring", "--witness", site / "witness.json").exit_code == 0
    shutil.copy(site / "backup.db", site / "ledger.db")
    assert "rolled back" in error_of("verify", site / "ledger.db", "--witness", site / "witness.json")


def test_move_then_only_the_new_file_works(site: Path) -> None:
    witness = ["--witness", site / "witness.json"]
    result = call("move", site / "ledger.db", site / "new.db", *witness)
    assert result.exit_code == 0, result.output
    assert call("verify", site / "new.db", *witness).exit_code == 0
    assert call("close", site / "new.db", "spring", *witness).exit_code == 0
    assert "moved" in error_of("close", site / "ledger.db", "spring")


def test_create_and_witness_ask_for_care(tmp_path: Path) -> None:
    witness = tmp_path / "witness.json"
    arguments = ["create", tmp_path / "ledger.db", "--cohort", "c", "--witness", witness]
    assert call(*arguments).exit_code == 0
    assert "there is, or was" in error_of(*arguments)
    with Ledger.open(tmp_path / "ledger.db", "c", witness) as ledger:
        ledger.declare_run("run", (gaussian(20.0),), LIMITS, fingerprint="f")
    witness.unlink()
    assert "missing" in error_of("verify", tmp_path / "ledger.db", "--witness", witness)
    assert call("witness", tmp_path / "ledger.db", witness).exit_code == 1  # nobody said yes
    assert not witness.exists()
    assert call("witness", tmp_path / "ledger.db", witness, "--yes").exit_code == 0
    assert call("verify", tmp_path / "ledger.db", "--witness", witness).exit_code == 0


@pytest.mark.parametrize("name", ["create", "show", "verify", "export", "backup", "move", "close", "witness"])
def test_help_has_an_example(name: str) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert f"Example: fedhypevae ledger {name}" in result.output
