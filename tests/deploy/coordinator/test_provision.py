"""What provisioning writes, and what it must not."""

from __future__ import annotations

import ipaddress
import stat
import sys
from pathlib import Path

import pytest
from cryptography import x509

from client_app.ledger.ledger import Ledger
from client_app.policy.policy import load_policy
from common.errors import ConfigError
from deploy.coordinator.folder import ServerFolder
from deploy.coordinator.provision import FederationPlan, provision
from deploy.machine.app_package import with_digest
from deploy.machine.folder_settings import split_address
from deploy.machine.keys import read_certificate
from deploy.site.app_guard import approved_digests
from deploy.site.folder import SiteFolder
from deploy.site.set_up import init_site, renew_site_key

PLAN = 'name = "study"\nserver_names = ["fl.example.org"]\nsites = ["st-anna", "charite"]\n'


def made(tmp_path: Path) -> Path:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "study.toml").write_text(PLAN)
    provision(FederationPlan.read(tmp_path / "study.toml"), tmp_path / "out")
    return tmp_path / "out"


def enrol(folder: Path) -> str:
    return init_site(folder, "st-anna/breast", lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=1.0)


def test_provision_sends_no_secret_to_a_site(tmp_path: Path) -> None:
    out = made(tmp_path)
    for path in (out / "sites").rglob("*"):
        if path.is_file():
            assert b"PRIVATE" not in path.read_bytes()
    secrets = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and _closed(path)}
    assert secrets == {"authority/ca.key", "server/server.key", "server/superexec.secret"}


def test_provision_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    out = made(tmp_path)
    key = (out / "authority" / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        provision(FederationPlan.read(tmp_path / "study.toml"), out)
    assert (out / "authority" / "ca.key").read_bytes() == key


def test_server_listens_to_sites_alone_and_switches_everything_off(tmp_path: Path) -> None:
    server = ServerFolder(made(tmp_path) / "server")
    superlink, superexec = (" ".join(program.command) for program in server.programs())
    assert "--host 127.0.0.1" in superlink
    assert "--fleet-api-address 0.0.0.0:9092" in superlink
    assert "--enable-supernode-auth" in superlink
    assert "--isolation process" in superlink
    assert "--superexec-auth-secret-file" in superlink
    assert "--superexec-auth-secret-file" in superexec
    assert "--insecure" not in superlink + superexec
    environment = server.environment()
    for switch in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        assert environment[switch] == ("0" if "TELEMETRY" in switch else "1")
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_site_starts_apps_through_its_own_command(tmp_path: Path) -> None:
    folder = made(tmp_path) / "sites" / "st-anna"
    enrol(folder)
    environment = SiteFolder(folder).environment()
    assert environment["PATH"].split(":")[0] == str(folder.resolve() / "bin")
    supernode, superexec, starter = (" ".join(program.command) for program in SiteFolder(folder).programs())
    assert "--superlink fl.example.org:9092" in supernode
    assert "--insecure" not in supernode
    assert "--isolation process" in supernode
    assert "--runtime-api-address 127.0.0.1:9094" in superexec
    assert starter.endswith(f"-m deploy.site.warm.starter {folder.resolve() / 'run'}")


def test_site_may_start_apps_cold(tmp_path: Path) -> None:
    folder = made(tmp_path) / "sites" / "st-anna"
    enrol(folder)
    command = folder / "bin" / "flwr-clientapp"
    SiteFolder(folder).environment()
    assert "warm/client.py" in command.read_text()
    settings = folder / "site.toml"
    settings.write_text(settings.read_text().replace("warm_start = true", "warm_start = false"))
    assert [program.name for program in SiteFolder(folder).programs()] == ["supernode", "app"]
    SiteFolder(folder).environment()
    assert command.read_text().endswith('-P -m deploy.site.app_guard "$@"\n')


def test_init_site_makes_key_policy_and_ledger_once(tmp_path: Path) -> None:
    folder = made(tmp_path) / "sites" / "st-anna"
    shown = enrol(folder)
    assert shown.count(":") == 7
    policy = load_policy(folder / "policy.toml")
    assert (policy.cohort_id, policy.run_epsilon, policy.approved_app_digests) == ("st-anna/breast", 1.0, ())
    with Ledger.open(folder / "ledger.db", "st-anna/breast") as ledger:
        assert not ledger.runs
    before = (folder / "keys" / "node").read_bytes()
    with pytest.raises(ConfigError, match="set up before"):
        enrol(folder)
    assert (folder / "keys" / "node").read_bytes() == before


def test_init_site_without_the_coordinators_files_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.toml"):
        enrol(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_renew_site_key_keeps_the_old_one(tmp_path: Path) -> None:
    folder = made(tmp_path) / "sites" / "st-anna"
    first = enrol(folder)
    assert renew_site_key(folder) != first
    assert (folder / "keys" / "node.old-1").is_file()


@pytest.mark.parametrize("line", [
    'sites = ["a", "a"]', "sites = []", 'sites = ["Bad Name"]', 'user = "root; rm -rf /"', "fleet_port = 70000",
    "x = 1",
])  # fmt: skip
def test_federation_plan_refuses_what_makes_no_sense(tmp_path: Path, line: str) -> None:
    path = tmp_path / "study.toml"
    kept = [text for text in PLAN.splitlines() if text.split(" = ")[0] != line.split(" = ")[0]]
    path.write_text("\n".join([*kept, line]) + "\n")
    with pytest.raises(ConfigError):
        FederationPlan.read(path)


def _closed(path: Path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) == 0o600


ENCODINGS = {"utf-8": True, "utf-8-sig": True, "cp1252": False, "utf-16": False, "utf-16-le": False}


@pytest.mark.parametrize(("encoding", "right"), ENCODINGS.items())
def test_settings_in_other_encodings_are_read_right_or_refused_in_one_line(
    tmp_path: Path, encoding: str, right: bool
) -> None:
    (tmp_path / "study.toml").write_bytes((PLAN + 'classes = ["gutartig", "bösartig"]\n').encode(encoding))
    if right:
        assert FederationPlan.read(tmp_path / "study.toml").classes == ["gutartig", "bösartig"]
    else:
        with pytest.raises(ConfigError, match="save it as UTF-8"):
            FederationPlan.read(tmp_path / "study.toml")
    site = made(tmp_path / "other") / "sites" / "st-anna"
    enrol(site)
    for name in ("site.toml", "policy.toml"):
        text = (site / name).read_text(encoding="utf-8")
        (site / name).write_bytes((f"# größer\n{text}").encode(encoding))
    if right:
        assert SiteFolder(site).settings.name == "st-anna"
        assert load_policy(site / "policy.toml").run_epsilon == 1.0
    else:
        with pytest.raises(ConfigError, match="save it as UTF-8"):
            _ = SiteFolder(site).settings
        with pytest.raises(ConfigError, match="save it as UTF-8"):
            load_policy(site / "policy.toml")


def test_guard_reads_the_policy_as_the_policy_is_read(tmp_path: Path) -> None:
    site = made(tmp_path) / "sites" / "st-anna"
    enrol(site)
    digest = "ab" * 32
    text = with_digest((site / "policy.toml").read_text(), digest)
    for encoding, approved in ENCODINGS.items():
        (site / "policy.toml").write_bytes(f"# ö\n{text}".encode(encoding))
        assert approved_digests(site / "policy.toml") == (frozenset({digest}) if approved else frozenset())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('server_names = ["fl.example.org:443"]', "host names and IP addresses"),
        ('server_names = ["[::1]"]', "host names and IP addresses"),
        ('server_names = [":::"]', "host names and IP addresses"),
        ('server_names = ["1.2.3"]', "host names and IP addresses"),
        ('server_names = ["1.2.3.444"]', "host names and IP addresses"),
        ('server_names = ["a..b"]', "host names and IP addresses"),
        ('server_names = ["-a"]', "host names and IP addresses"),
        ('server_names = [""]', "host names and IP addresses"),
        ('server_names = ["fl example"]', "host names and IP addresses"),
        ('server_names = ["krankenhäuser.example"]', "host names and IP addresses"),
        ('server_names = ["good", "bad_.", "b/d"]', "host names and IP addresses"),
        ("fleet_port = 8000", "must differ"),
        ("fleet_port = 70000", "fleet_port"),
        ('classes = ["a", "a"]', "different, non-empty names"),
        ('classes = ["a", " a"]', "different, non-empty names"),
        ('classes = ["a", ""]', "different, non-empty names"),
        ('sites = ["a", "a"]', "listed twice"),
        ('sites = ["../a"]', "sites"),
        ('server_folder = "srv"', "server_folder"),
        ('site_folder = "/srv/my site"', "site_folder"),
    ],
)
def test_provision_refuses_a_plan_before_it_writes_anything(
    tmp_path: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.cli import main

    lines = [old for old in PLAN.splitlines() if old.split()[0] != line.split()[0]]
    (tmp_path / "study.toml").write_text("\n".join([*lines, line]), encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["fedhypevae", "provision", str(tmp_path / "study.toml"), "--out", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["::1", "fd00::9092", "2001:db8::1"])
def test_provision_takes_ipv6_names(tmp_path: Path, name: str) -> None:
    plan = FederationPlan(name="study", server_names=[name, "fl.example.org"], sites=["st-anna"])
    provision(plan, tmp_path / "out")
    site, server = SiteFolder(tmp_path / "out" / "sites" / "st-anna"), ServerFolder(tmp_path / "out" / "server")
    assert split_address(site.settings.server) == (name, 9092)
    assert f"--superlink [{name}]:9092 " in " ".join(site.programs()[0].command)
    assert "--fleet-api-address [::]:9092 " in " ".join(server.programs()[0].command)
    names = read_certificate(server.path / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert ipaddress.ip_address(name) in names.value.get_values_for_type(x509.IPAddress)


@pytest.mark.parametrize("server", ["::1:9092", "host:0", "host:70000", "[host]:9092", "ho st:9092", "host", "[::1]"])
def test_site_settings_refuse_an_address_that_is_none(tmp_path: Path, server: str) -> None:
    (tmp_path / "site.toml").write_text(f'name = "a"\nserver = "{server}"\n')
    with pytest.raises(ConfigError, match="server"):
        _ = SiteFolder(tmp_path).settings


def test_provision_says_that_its_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = FederationPlan(name="study", server_names=["a"], sites=["st-anna"])
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match="can't make the folder"):
            provision(plan, out)


def test_init_site_refuses_before_it_writes_where_a_secret_is_left_over(tmp_path: Path) -> None:
    site = made(tmp_path) / "sites" / "st-anna"
    (site / "keys").mkdir()
    (site / "keys" / "superexec.secret").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        enrol(site)
    assert not (site / "keys" / "node").exists()
