"""The shipped systemd unit lets a site write where its policy says that ledger and witness lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app.policy.policy import load_policy
from deploy.coordinator.provision import FederationPlan, provision
from deploy.doctor_ledger import ledger_faults
from deploy.site.folder import SiteFolder
from deploy.site.set_up import init_site
from deploy.site.unit import UNIT, unit_faults


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    """A site at the place that its unit names."""
    home = tmp_path / "site"
    plan = FederationPlan(name="trial", server_names=["fl"], sites=["st-anna"], site_folder=str(home))
    provision(plan, tmp_path / "out")
    (tmp_path / "out" / "sites" / "st-anna").rename(home)
    return SiteFolder(home)


def init(site: SiteFolder, witness: Path | str = "") -> None:
    init_site(
        site.path, "trial/st-anna", lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=3.0, witness=str(witness)
    )


def writable(site: SiteFolder) -> list[str]:
    lines = (site.path / UNIT).read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith("ReadWritePaths=")]


def test_the_units_place_for_the_witness_is_the_one_that_init_was_given(site: SiteFolder, tmp_path: Path) -> None:
    disk = tmp_path / "other-disk" / "st-anna"
    init(site, disk / "witness.json")
    assert writable(site) == [str(disk), str(site.path), f"-{site.path}-witness"]
    assert list(ledger_faults(site)) == []


def test_the_default_witness_needs_no_other_line(site: SiteFolder) -> None:
    before = (site.path / UNIT).read_bytes()
    init(site)
    assert (site.path / UNIT).read_bytes() == before
    assert list(ledger_faults(site)) == []


def test_doctor_finds_a_unit_that_was_installed_before_the_witness_was_chosen(site: SiteFolder, tmp_path: Path) -> None:
    installed = tmp_path / "systemd"
    installed.mkdir()
    old = (site.path / UNIT).read_text()
    (installed / UNIT).write_text(old)
    init(site, tmp_path / "other-disk" / "witness.json")
    needed = [site.path, tmp_path / "other-disk"]
    (line,) = unit_faults(site, needed, [installed])
    assert f"{installed / UNIT} keeps the site from writing to {tmp_path / 'other-disk'}" in line
    assert "daemon-reload" in line
    drop_in = installed / f"{UNIT}.d" / "witness.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\nReadWritePaths={tmp_path / 'other-disk'}\n")
    assert unit_faults(site, needed, [installed]) == []
    drop_in.unlink()
    (installed / UNIT).write_text(old.replace(str(site.path), "/srv/another-site"))
    assert unit_faults(site, needed, [installed]) == []  # it starts another site


def test_doctor_asks_the_unit(site: SiteFolder, tmp_path: Path) -> None:
    old = (site.path / UNIT).read_text()
    init(site, tmp_path / "other-disk" / "witness.json")
    (site.path / UNIT).write_text(old)
    (line,) = ledger_faults(site)
    assert line.startswith("unit: ")


def test_doctor_finds_a_witness_that_this_process_can_not_write(site: SiteFolder) -> None:
    """As in the unit's own name space, where `site start` looks before it starts anything."""
    init(site)
    path = site.path / "policy.toml"
    witness = load_policy(path).witness
    path.write_text(path.read_text().replace(witness, "/proc/witness.json"))  # nobody writes there, root neither
    (line,) = [line for line in ledger_faults(site) if not line.startswith("unit:")]
    assert "can't write to /proc" in line
