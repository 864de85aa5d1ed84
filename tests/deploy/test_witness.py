"""The witness that `site init` makes, what the doctor says of it, and what it is for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client_app.ledger import upkeep
from client_app.ledger.chain import read_witness
from client_app.ledger.ledger import Ledger
from client_app.ledger.receipts import key_path
from client_app.policy.policy import load_policy
from common.config.run import RunConfig
from common.errors import BudgetExceeded, ConfigError, LedgerError
from common.methods import get_method
from common.privacy.events import gaussian
from deploy.cli import app
from deploy.coordinator.provision import FederationPlan, provision
from deploy.doctor import advise_site
from deploy.doctor_ledger import ledger_faults
from deploy.site.folder import SiteFolder
from deploy.site.set_up import init_site
from embeddings.store.writing import write_store
from server_app.receipts import Receipts, move_receipt
from tests.harness import Federation, HarnessSite, make_set

COHORT = "st-anna/breast"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    provision(FederationPlan(name="trial", server_names=["127.0.0.1"], sites=["st-anna"]), tmp_path / "out")
    return tmp_path / "out" / "sites" / "st-anna"


def init(folder: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["site", "init", str(folder), "--cohort", COHORT, "--unit", "record", *options])
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    return " ".join(done.output.split())


def set_witness(folder: Path, witness: str) -> None:
    path = folder / "policy.toml"
    lines = [
        f'witness = "{witness}"' if line.startswith("witness =") else line for line in path.read_text().split("\n")
    ]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(("patients", "unit", "cap"), [(True, "patient", 4), (False, "record", None)])
def test_site_init_protects_whom_the_data_names(folder: Path, patients: bool, unit: str, cap: int | None) -> None:
    write_store(folder / "site.parquet", make_set(30, patients=patients))
    done = CliRunner().invoke(app, ["site", "init", str(folder), "--cohort", COHORT])
    assert done.exit_code == 0, done.output
    policy = load_policy(folder / "policy.toml")
    assert (policy.unit, policy.max_records_per_patient) == (unit, cap)


def test_site_init_does_not_guess_whom_to_protect(folder: Path) -> None:
    done = CliRunner().invoke(app, ["site", "init", str(folder), "--cohort", COHORT])
    assert isinstance(done.exception, ConfigError)
    assert "--unit patient" in str(done.exception)
    assert not (folder / "keys").exists()


def test_doctor_advises_the_patient_until_the_first_run_has_bound_the_ledger(folder: Path) -> None:
    init(folder)  # before there was data
    write_store(folder / "site.parquet", make_set(30, patients=True))
    site = SiteFolder(folder)
    assert [line for line in advise_site(site) if "the data names patients" in line]
    policy = load_policy(folder / "policy.toml")
    with Ledger.open(folder / "ledger.db", COHORT, policy.witness_path(folder)) as ledger:
        ledger.declare_run("r", [gaussian(5.0)], policy.limits, fingerprint="x")
    assert not [line for line in advise_site(site) if "the data names patients" in line]


def test_three_runs_fit_into_the_lifetime_that_init_writes(folder: Path) -> None:
    """Each as the defaults ask for, declared after the results of those before."""
    init(folder)
    policy = load_policy(folder / "policy.toml")
    config = RunConfig()
    events = get_method(config.method).plan(config).all_events
    with Ledger.open(folder / "ledger.db", COHORT, policy.witness_path(folder)) as ledger:
        for name in ("first", "second", "third"):
            ledger.declare_run(name, events, policy.limits, fingerprint="x")
        with pytest.raises(BudgetExceeded):
            ledger.declare_run("fourth", events, policy.limits, fingerprint="x")


def test_site_init_makes_a_witness_outside_its_folder(folder: Path) -> None:
    said = init(folder)
    witness = load_policy(folder / "policy.toml").witness_path(folder)
    assert witness == folder.resolve().with_name("st-anna-witness") / "witness.json"
    assert str(witness) in said
    assert "to another disk" in said  # both lie in one temporary folder
    with Ledger.open(folder / "ledger.db", COHORT, witness) as ledger:
        noted = read_witness(witness)
        assert noted is not None
        assert (noted.cohort_id, noted.head) == (COHORT, ledger.head)


def test_site_init_writes_nothing_that_others_may_read(folder: Path) -> None:
    before = os.umask(0o022)
    try:
        init(folder)
        site, witness = SiteFolder(folder), folder.resolve().with_name("st-anna-witness")
        with Ledger.open(folder / "ledger.db", COHORT, site.default_witness) as ledger:
            upkeep.backup(ledger, folder / "copy.db")
            upkeep.export_to(ledger, folder / "export.json")
            beside = list(folder.glob("ledger.db*"))
            assert len(beside) == 3  # the log and its index, too
            private = [*beside, folder / "copy.db", folder / "export.json", site.default_witness, key_path(folder)]
            assert {path: oct(path.stat().st_mode & 0o777) for path in private} == dict.fromkeys(private, "0o600")
        for path in (folder, witness, folder / "keys"):
            assert oct(path.stat().st_mode & 0o777) == "0o700"
    finally:
        os.umask(before)


def test_site_init_takes_the_place_that_is_named_and_refuses_one_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--witness"):
        init_site(
            folder, COHORT, lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=3.0,
            witness=str(tmp_path / "file" / "witness.json"),
        )  # fmt: skip
    assert not (folder / "keys").exists()
    init(folder, "--witness", str(tmp_path / "other" / "w.json"))
    assert read_witness(tmp_path / "other" / "w.json") is not None
    assert not SiteFolder(folder).default_witness.exists()


def test_doctor_asks_for_a_witness_where_there_is_none(folder: Path) -> None:
    init(folder)
    assert list(ledger_faults(SiteFolder(folder))) == []
    set_witness(folder, "")
    (line,) = ledger_faults(SiteFolder(folder))
    assert "fedhypevae ledger witness" in line
    assert "another disk" in line
    said = CliRunner().invoke(app, ["doctor", str(folder), "--offline"])
    assert said.exit_code == 1
    assert "witness: the ledger has none" in " ".join(said.output.split())


@pytest.mark.parametrize(("place", "word"), [("kept/w.json", "own folder"), ("../w/w.json", "own disk")])
def test_doctor_advises_another_place_for_the_witness(folder: Path, place: str, word: str) -> None:
    init(folder, "--witness", place)
    site = SiteFolder(folder)
    (line,) = advise_site(site)
    assert word in line
    assert "to another disk" in line
    assert list(ledger_faults(site)) == []  # it may start all the same
    (folder / "ledger.db").chmod(0o644)
    assert any("chmod 600" in line for line in advise_site(site))


def test_doctor_is_content_with_another_disk(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == folder.stat().st_dev:
        pytest.skip("this machine has one disk")
    place = other / f"witness-of-{tmp_path_factory.getbasetemp().name}-{os.getpid()}"
    try:
        init(folder, "--witness", str(place / "w.json"))
        assert advise_site(SiteFolder(folder)) == []
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize("also", ["nothing more", "the witness is taken away", "state and log are put back, too"])
def test_old_ledger_is_refused_at_a_site_as_init_makes_it(folder: Path, tmp_path: Path, also: str) -> None:
    """By the witness alone: the server, which may work with the thief, brings no receipt."""
    init(folder)
    write_store(folder / "site.parquet", make_set(60))
    site, run = HarnessSite("st-anna", 101, folder), {"num_rounds": 1, "epsilon": 1.0}
    federation = Federation(tmp_path, [site])
    before = tmp_path / "copy"
    shutil.copytree(folder, before)
    assert federation.run(**run)["rounds_taken_part"] == [["st-anna"]]
    sent = len([seen for seen in federation.sent() if seen.message.content.array_records])
    if also.startswith("state"):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    for path in folder.glob("ledger.db*"):
        path.unlink()
    shutil.copy(before / "ledger.db", folder / "ledger.db")
    if also.startswith("the witness"):
        SiteFolder(folder).default_witness.unlink()
    (tmp_path / "receipts.json").unlink()
    with pytest.raises(SystemExit):
        federation.run(**run, run_id=2)
    assert "st-anna refused: ledger" in federation.status()["error"]
    assert len([seen for seen in federation.sent() if seen.message.content.array_records]) == sent
    assert site.entries() == 1


def test_ledger_cannot_be_made_again_once_it_was_used(tmp_path: Path) -> None:
    """What a kill between witness and ledger leaves may be completed; what was used may not."""
    path, witness = tmp_path / "ledger.db", tmp_path / "elsewhere" / "w.json"
    with Ledger.create(path, COHORT, witness) as ledger:
        first = ledger.head
    path.unlink()
    with pytest.raises(LedgerError, match="there is, or was"):
        Ledger.create(path, "another cohort", witness)
    with Ledger.create(path, COHORT, witness) as ledger:
        assert ledger.head != first
        upkeep.accept_witness(ledger, witness)
    with Ledger.open(path, COHORT, witness) as ledger:
        upkeep.move(ledger, tmp_path / "moved.db")
    path.unlink()
    with pytest.raises(LedgerError, match="there is, or was"):
        Ledger.create(path, COHORT, witness)


def test_rotated_site_keeps_its_receipt_unless_it_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "receipts.json"
    Receipts(path).note({7: ("st-anna", "1:" + "0" * 64, "ab"), 8: ("charite", "2:" + "0" * 64, "cd")})
    move_receipt(path, "7", "9")
    kept = Receipts(path)
    assert kept.words(9) == {"receipt": "1:" + "0" * 64, "seal": "ab"}
    assert kept.words(7) == {}
    move_receipt(path, "9", None)
    assert Receipts(path).words(9) == {}
    assert Receipts(path).words(8)["seal"] == "cd"
    move_receipt(tmp_path / "none.json", "7", "9")
    assert not (tmp_path / "none.json").exists()
