"""A real server and three real sites, with TLS and node keys, killed in every way in turn.

One federation serves all steps, since starting one takes most of the time; each step has its own run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from client_app.ledger import Ledger
from client_app.site import load_policy
from common.config import Scalar
from deploy.folders import SiteFolder
from deploy.keys import make_authority, make_node_key
from deploy.registry import list_sites, register, revoke
from deploy.remote import follow, start_run
from server_app.checkpoint import load_checkpoint
from tests.integration.federation_cases import (
    REPOSITORY,
    Federation,
    Process,
    children_of,
    demo_data,
    free_ports,
    wait_for,
)

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(2400)]
ROUNDS = 5
SETTINGS: dict[str, Scalar] = {
    "num-rounds": ROUNDS,
    "num-sites": 3,
    "min-sites": 2,
    "round-timeout": 400.0,
    "epsilon": 2.0,
    "synthetic-rows": 500,
    "meta-steps": 20,
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("federation"), 3, data=demo_data(3, 300))
    try:
        made.start_server()
        made.register_all()
        for name in made.sites:
            made.start_site(name)
        made.wait_online(*made.sites)
        yield made
    finally:
        made.end()


def rounds_done(federation: Federation, output: str) -> int:
    try:
        return load_checkpoint(federation.server.work / output)[0].round
    except Exception:
        return -1


def wait_for_round(federation: Federation, output: str, number: int) -> None:
    wait_for(f"{number} rounds of {output}", lambda: rounds_done(federation, output) >= number, 600)


def summary_of(output: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def charged_events(site: SiteFolder, run: str) -> int:
    """How many events a site's ledger holds against a run; opening it checks its whole chain."""
    policy = load_policy(site.path / "policy.toml")
    with Ledger.open(policy.ledger_path(site.path), policy.cohort_id, read_only=True) as ledger:
        spent = ledger.spent(policy.lifetime_delta)
        assert spent.epsilon <= policy.lifetime_epsilon
        return sum(event.count for event in ledger.runs[run].charged)


def test_federation_link_is_grpc_and_closed_to_strangers(federation: Federation) -> None:
    port = federation.server.settings.fleet_port
    ca = (federation.server.path / "ca.crt").read_bytes()
    context = ssl.create_default_context(cadata=ca.decode())
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as link,
    ):
        assert link.selected_alpn_protocol() == "h2"
    with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(ca)) as channel:
        grpc.channel_ready_future(channel).result(20)
        activate = channel.unary_unary("/flwr.proto.Fleet/ActivateNode")
        with pytest.raises(grpc.RpcError) as refused:
            activate(b"", timeout=20)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_federation_refuses_wrong_authority_and_strange_or_revoked_keys(federation: Federation) -> None:
    strangers = {name: clone_site(federation, name) for name in ("stranger", "deceived")}
    make_authority(strangers["deceived"].path / "other", "other")
    shutil.copy(strangers["deceived"].path / "other" / "ca.crt", strangers["deceived"].path / "ca.crt")
    outputs = {}
    for name, site in strangers.items():
        outputs[name] = federation.root / f"{name}.out"
        federation.running[name] = Process(["site", "start", "--no-check"], site.path, outputs[name])
    said = {"stranger": "refuses this node's key", "deceived": "not signed by the authority"}
    for name, words in said.items():
        wait_for(f"{name} is refused", lambda n=name, w=words: w in outputs[n].read_text(), 400)
    federation.running.pop("deceived").end()
    register(federation.server, "stranger", strangers["stranger"].node_key.with_suffix(".pub"))
    federation.wait_online("stranger")  # the supervised node came in by itself, once it was registered
    federation.running.pop("stranger").end()
    revoke(federation.server, "stranger")
    before = outputs["stranger"].read_text().count("refuses this node's key")
    federation.running["stranger"] = Process(
        ["site", "start", "--no-check"], strangers["stranger"].path, outputs["stranger"]
    )
    wait_for(
        "the revoked site is refused",
        lambda: outputs["stranger"].read_text().count("refuses this node's key") > before,
        400,
    )
    federation.running.pop("stranger").end()
    assert {site.name for site in list_sites(federation.server) if site.status == "online"} == set(federation.sites)


def test_federation_completes_though_a_site_and_the_superlink_are_killed(federation: Federation) -> None:
    settings = {**SETTINGS, "output-dir": "outputs/kills"}
    run = start_run(federation.server, federation.app, settings)
    wait_for_round(federation, "outputs/kills", 1)
    app = federation.program_pid("site-3", "app")
    earlier = set(children_of(app))  # may have sent its reply already, and be about to end
    wait_for("site-3 computes", lambda: bool(set(children_of(app)) - earlier), 400, 0.05)
    federation.running.pop("site-3").kill()
    federation.start_site("site-3")  # refused for about a minute; its supervisor tries until it is let in
    wait_for_round(federation, "outputs/kills", 2)
    os.kill(federation.program_pid("server", "superlink"), signal.SIGKILL)
    output = follow(federation.server, run, federation.app, settings, print, patience_s=900)
    summary = summary_of(output)
    taken = summary["rounds_taken_part"]
    assert len(taken) == ROUNDS
    assert all({"site-1", "site-2"} <= set(sites) for sites in taken)
    assert any("site-3" not in sites for sites in taken)  # it was killed in mid-round
    assert any("site-3" in missing for missing in summary["rounds_missing"])
    for name, site in federation.sites.items():
        used = 1 + sum(name in sites for sites in taken)  # statistics, and each round that was used
        charged = charged_events(site, summary["run"])
        assert charged == 1 + ROUNDS if name != "site-3" else used <= charged <= 1 + ROUNDS


def test_federation_resumes_after_the_server_app_is_killed_and_takes_no_garbage(federation: Federation) -> None:
    federation.running.pop("site-3").end()
    settings = {**SETTINGS, "output-dir": "outputs/resumed"}
    with rogue(federation, "site-3"):
        run = start_run(federation.server, federation.app, settings)
        wait_for_round(federation, "outputs/resumed", 2)
        executor = federation.program_pid("server", "server-app")
        (server_app,) = children_of(executor)
        os.kill(server_app, signal.SIGKILL)
        with pytest.raises(Exception, match="--resume"):
            follow(federation.server, run, federation.app, settings, print, patience_s=300)
        done = rounds_done(federation, "outputs/resumed")
        again = {**settings, "resume": True}
        run = start_run(federation.server, federation.app, again)
        output = follow(federation.server, run, federation.app, again, print, patience_s=900)
    summary = summary_of(output)
    assert 2 <= done < ROUNDS
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]] * ROUNDS  # none of the rogue's replies was used
    reasons = [missing["site-3"] for missing in summary["rounds_missing"]]
    for reason, words in zip(
        reasons, ("not finite", "must be float32 of shape", "allow-list", "float64", "norm"), strict=True
    ):
        assert words in reason
    for name in ("site-1", "site-2"):
        # the interrupted round may have been charged before the kill; the same bytes are sent again, and charged once
        assert charged_events(federation.sites[name], summary["run"]) == 1 + ROUNDS


def clone_site(federation: Federation, name: str) -> SiteFolder:
    """A site's folder with a key that the server does not know."""
    folder = federation.root / name
    shutil.copytree(
        federation.sites["site-1"].path, folder, ignore=shutil.ignore_patterns("keys", "logs", ".flwr", "bin")
    )
    make_node_key(folder / "keys" / "node")
    shutil.copy(federation.sites["site-1"].path / "keys" / "superexec.secret", folder / "keys")
    first, second = free_ports(2)
    lines = (folder / "site.toml").read_text().splitlines()
    changed = {"name": f'"{name}"', "runtime_port": str(first), "health_port": str(second)}
    kept = [line for line in lines if line.split(" = ")[0] not in changed]
    (folder / "site.toml").write_text(
        "\n".join([*kept, *(f"{key} = {value}" for key, value in changed.items())]) + "\n"
    )
    return SiteFolder(folder)


@contextlib.contextmanager
def rogue(federation: Federation, name: str) -> Iterator[None]:
    """A site under whose key a program sends garbage."""
    import subprocess
    import sys

    from deploy.supervise import end_processes

    site = federation.sites[name]
    commands = federation.root / "rogue-bin"
    commands.mkdir()
    (commands / "flwr-clientapp").write_text(
        f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/integration/rogue_app.py "$@"\n'
    )
    (commands / "flwr-clientapp").chmod(0o755)
    environment = {**site.environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{commands}:{environment['PATH']}"
    processes = []
    try:
        for program in site.programs():
            log = (site.path / "logs" / f"rogue-{program.name}.log").open("ab")
            processes.append(subprocess.Popen(program.command, env=environment, cwd=site.path, stdout=log, stderr=log))
        federation.wait_online(name)
        yield
    finally:
        end_processes(processes)
