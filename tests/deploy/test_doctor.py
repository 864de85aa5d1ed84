"""Ten faults planted in a healthy site, one at a time: the doctor names each in one line, with its cure."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from deploy import doctor
from deploy.coordinator.folder import ServerFolder
from deploy.coordinator.provision import FederationPlan, provision
from deploy.doctor import examine_server, examine_site
from deploy.machine.app_package import with_digest
from deploy.machine.keys import make_authority, make_node_key
from deploy.site.folder import ALIVE, SiteFolder
from deploy.site.peers import pin_peers
from deploy.site.set_up import init_site
from embeddings.encoders.efficientnet import offline_identity
from embeddings.store.sets import EmbeddingSet, SetMetadata
from embeddings.store.writing import write_store
from tests.harness import Handler, HarnessSite
from tests.ports import free_ports
from tests.secagg_cases import ROUNDS_ONLY, SHARED, keyed_federation


class Listener:
    """A TLS server with a federation's certificate: what a site reaches before any gRPC."""

    def __init__(self, server: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(server / "server.pem", server / "server.key")
        self._context.set_alpn_protocols(["h2"])
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                raw, _ = self._socket.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(raw, server_side=True) as link:
                    link.recv(1)
            except OSError:
                continue

    def close(self) -> None:
        self._socket.close()


def write_data(path: Path, classes: tuple[str, ...]) -> None:
    rows = np.random.default_rng(1).normal(size=(20, 1280)).astype(np.float32)
    labels = np.arange(20, dtype=np.int64) % len(classes)
    write_store(path, EmbeddingSet(rows, labels, SetMetadata(offline_identity(classes))))


@pytest.fixture
def healthy(tmp_path: Path) -> Iterator[SiteFolder]:
    plan = FederationPlan(name="trial", server_names=["127.0.0.1"], sites=["st-anna"], classes=["a", "b"])
    provision(plan, tmp_path / "out")
    listener = Listener(tmp_path / "out" / "server")
    folder = tmp_path / "out" / "sites" / "st-anna"
    text = (folder / "site.toml").read_text()
    ports = free_ports(2)
    for before, after in (
        ("runtime_port = 9094", f"runtime_port = {ports[0]}"),
        ("health_port = 9095", f"health_port = {ports[1]}"),
        ("127.0.0.1:9092", f"127.0.0.1:{listener.port}"),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    (folder / "site.toml").write_text(text)
    init_site(
        folder, "trial/st-anna", lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=3.0,
        approved_app_digests=("0" * 64,),
    )  # fmt: skip
    write_data(folder / "site.parquet", ("a", "b"))
    yield SiteFolder(folder)
    listener.close()


def other_version(site: SiteFolder) -> None:
    path = site.path / "federation.json"
    agreed = json.loads(path.read_text())
    agreed["versions"]["flwr"] = "1.41.0"
    path.write_text(json.dumps(agreed))


def damaged_data(site: SiteFolder) -> None:
    content = site.data.read_bytes()
    site.data.write_bytes(content[: len(content) // 2])


def changed_ledger(site: SiteFolder) -> None:
    with sqlite3.connect(site.path / "ledger.db") as base:
        (table,) = base.execute("SELECT name FROM sqlite_master WHERE type='table' LIMIT 1").fetchone()
        base.execute(f"DROP TABLE {table}")


def nobody_there(site: SiteFolder) -> None:
    (port,) = free_ports(1)
    text = (site.path / "site.toml").read_text()
    before = site.settings.server
    (site.path / "site.toml").write_text(text.replace(before, f"127.0.0.1:{port}"))


def strange_authority(site: SiteFolder) -> None:
    make_authority(site.path / "strange", "strange")
    shutil.copy(site.path / "strange" / "ca.crt", site.path / "ca.crt")


def old_app_in_force(site: SiteFolder) -> None:
    path = site.path / "policy.toml"
    path.write_text(with_digest(path.read_text(), "1" * 64, ("0" * 64,)))


def misspelt_limit(site: SiteFolder) -> None:
    with (site.path / "policy.toml").open("a") as policy:
        policy.write("max_cilp_norm = 1.0\n")


FAULTS: dict[str, tuple[Callable[[SiteFolder], object], str, str]] = {
    "version": (other_version, "version of flwr", "install flwr 1.41.0"),
    "old app": (old_app_in_force, "several packages of one app", "fedhypevae site approve"),
    "no data": (lambda site: site.data.unlink(), "no embeddings", "fedhypevae embed"),
    "damaged data": (damaged_data, "data:", "site.parquet"),
    "class set": (lambda site: write_data(site.data, ("a", "c")), "class set", "embed again"),
    "policy": (
        lambda site: (site.path / "policy.toml").open("a").write("max_cilp_norm = 1.0\n"),
        "policy",
        "max_cilp_norm",
    ),
    "ledger": (changed_ledger, "ledger", "restore"),
    "lost ledger": (lambda site: (site.path / "ledger.db").unlink(), "ledger", "restore it from a copy"),
    "open key": (lambda site: site.node_key.chmod(0o644), "can be read by others", "chmod 600"),
    "authority": (strange_authority, "not signed by the authority", "ask for ca.crt"),
    "unreachable": (nobody_there, "nobody listens", "is the server started"),
}


def test_doctor_finds_nothing_at_a_healthy_site(healthy: SiteFolder) -> None:
    assert examine_site(healthy) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_names_a_planted_fault_and_its_cure(healthy: SiteFolder, fault: str) -> None:
    plant, name, cure = FAULTS[fault]
    plant(healthy)
    findings = examine_site(healthy)
    assert len(findings) == 1, findings
    assert name in findings[0]
    assert cure in findings[0]
    assert "\n" not in findings[0]


def test_doctor_finds_nothing_at_a_healthy_site_that_runs(healthy: SiteFolder) -> None:
    """Its ports are taken then, by itself."""
    settings = healthy.settings
    with (
        socket.create_server(("127.0.0.1", settings.runtime_port)),
        socket.create_server(("127.0.0.1", settings.health_port)),
    ):
        assert [line.split(":")[0] for line in examine_site(healthy)] == [
            f"port {settings.runtime_port}",
            f"port {settings.health_port}",
        ]
        alive = healthy.path / ALIVE
        alive.touch()
        assert examine_site(healthy) == []
        os.utime(alive, (0, 0))  # as it was left when the site stopped
        assert len(examine_site(healthy)) == 2


def test_doctor_compares_the_encoder(healthy: SiteFolder) -> None:
    path = healthy.path / "federation.json"
    agreed = json.loads(path.read_text())

    def found(**encoder: str) -> list[str]:
        path.write_text(json.dumps(agreed | encoder))
        return examine_site(healthy)

    assert found(encoder="efficientnet-lite0") == []
    (line,) = found(encoder="dinov2-small", encoder_revision="a" * 40)
    assert line.startswith("encoder: this site's embeddings are of efficientnet-lite0")
    assert f"embed --encoder dinov2-small --revision {'a' * 40}" in line
    assert len(found(encoder="efficientnet-lite0", encoder_revision="another")) == 1


def test_doctor_holds_packages_against_what_this_program_needs(
    healthy: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Python or another torch than the server's is no fault; one that is too old is."""
    path = healthy.path / "federation.json"
    agreed = json.loads(path.read_text())
    path.write_text(json.dumps({**agreed, "versions": agreed["versions"] | {"python": "3.99", "torch": "9.9.9"}}))
    assert examine_site(healthy) == []
    needs = ["torch>=999.0", "numpy>=1", "no-such-package>=2", "mlflow>=999; extra == 'tracking'"]
    monkeypatch.setattr("deploy.machine.versions.metadata.requires", lambda name: needs)
    torch, missing = examine_site(healthy)
    assert torch.startswith("package: torch>=999.0 (here: 2.")
    assert missing.startswith("package: no-such-package>=2 (here: none)")


def test_doctor_finds_a_wrong_clock_and_an_ended_certificate(healthy: SiteFolder) -> None:
    past, future = datetime.now(UTC) - timedelta(days=2), datetime.now(UTC) + timedelta(days=5000)
    assert [line for line in examine_site(healthy, now=past) if "set it (NTP)" in line]
    assert [line for line in examine_site(healthy, now=future) if "ended on" in line]


def test_doctor_finds_a_full_disk(healthy: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_NEEDED_BYTES", 10**18)
    (finding,) = examine_site(healthy)
    assert finding.startswith("disk:")
    assert "free some" in finding


def test_doctor_says_that_no_app_is_approved(healthy: SiteFolder) -> None:
    path = healthy.path / "policy.toml"
    path.write_text(path.read_text().replace('"' + "0" * 64 + '"', ""))
    (finding,) = examine_site(healthy)
    assert "fedhypevae site approve" in finding


def test_doctor_finds_a_gpu_build_without_a_gpu(healthy: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    (finding,) = examine_site(healthy)
    assert "CUDA 12.6" in finding
    assert "install the driver" in finding


def test_doctor_finds_that_the_wanted_gpu_is_not_there(healthy: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = healthy.path / "site.toml"
    settings.write_text(settings.read_text().replace('device = ""', 'device = "cuda"'))
    (finding,) = examine_site(healthy)
    assert finding.startswith("device: expected one that this machine has, found 'cuda'")
    assert "set device to auto or cpu" in finding


def test_doctor_asks_for_peers_where_secagg_is_allowed(healthy: SiteFolder) -> None:
    policy = healthy.path / "policy.toml"
    policy.write_text(policy.read_text().replace('["local"]', '["local", "secagg"]'))
    (line,) = examine_site(healthy)
    assert "peers.json" in line
    assert "site pin" in line
    make_node_key(healthy.path / "other" / "node")
    pin_peers(healthy, {"st-bernard": healthy.path / "other" / "node.pub"})
    assert examine_site(healthy) == []


def test_doctor_at_the_server_names_the_site_that_lied_and_how_to_shut_it_out(tmp_path: Path) -> None:
    """A whole run with a site whose mask key is none: the next look at the server says whom to ask."""
    federation = keyed_federation(tmp_path / "server" / "work", 4)

    def no_key(at: HarnessSite, message: Message, handler: Handler) -> Message | None:
        reply = handler()
        words = reply.content.config_records["words"]
        if at.name == "site-4" and "card" in words:
            words["card"] = json.dumps({**json.loads(str(words["card"])), "mask_key": "00" * 32})
        return reply

    plan = FederationPlan(name="trial", server_names=["127.0.0.1"], sites=["site-4"], classes=["a", "b"])
    provision(plan, tmp_path / "out")
    server = ServerFolder(tmp_path / "out" / "server")
    before = examine_server(server)
    federation.run(**SHARED, **ROUNDS_ONLY, tamper=no_key)
    shutil.move(federation.output, server.work / "outputs" / "run")
    (line,) = set(examine_server(server)) - set(before)
    assert line.startswith("site site-4: round-1 of the newest run: sent a card that can't be used")
    assert line.endswith(f"fedhypevae server revoke {server.path} site-4")
