"""A real server and three real sites, with TLS and node keys: strangers, kills, sites that come and go.

One federation serves all steps, since starting one takes most of the time.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from client_app.policy.policy import load_policy
from common.config.presets import resolve
from common.errors import FederationError
from deploy.coordinator.registry import list_sites, register, revoke
from deploy.coordinator.run import follow, start_run
from deploy.machine.keys import make_authority, make_node_key
from deploy.site.folder import SiteFolder
from server_app.checkpoint import load_checkpoint
from tests.integration.federation_cases import (
    ROUNDS,
    RUN_SETTINGS,
    Federation,
    charged_events,
    children_of,
    demo_data,
    summary_of,
    wait_for,
    wait_for_round,
)
from tests.ports import free_ports

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("federation"), 3, data=demo_data(3, 300))
    try:
        made.start_server()
        made.strangers = make_strangers(made)
        for name in made.strangers:
            made.start_stranger(name)
        made.bring_sites()
        yield made
    finally:
        made.end()


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


def test_federation_refuses_a_wrong_authority_and_an_unregistered_key(federation: Federation) -> None:
    said = {"stranger": "refuses this node's key", "deceived": "not signed by the authority"}
    for name, words in said.items():
        output = federation.root / f"{name}.out"
        wait_for(f"{name} is refused", lambda o=output, w=words: w in o.read_text(), 400)
    federation.running.pop("deceived").end()
    assert {site.name for site in list_sites(federation.server) if site.status == "online"} == set(federation.sites)


def test_federation_completes_though_a_site_and_the_superlink_are_killed_and_another_comes_and_goes(
    federation: Federation,
) -> None:
    settings = {**RUN_SETTINGS, "output-dir": "outputs/kills"}
    run = start_run(federation.server, federation.app, resolve(settings))
    wait_for_round(federation, "outputs/kills", 1)
    app = federation.program_pid("site-3", "app")
    earlier = set(children_of(app))  # may have sent its reply already, and be about to end
    wait_for("site-3 computes", lambda: bool(set(children_of(app)) - earlier), 400, 0.05)
    federation.running.pop("site-3").kill()
    federation.start_site("site-3")  # refused for about a minute; its supervisor tries until it is let in
    # meanwhile the stranger, refused so far, is registered: its supervised node comes in by itself, in mid-run
    stranger = federation.strangers["stranger"]
    register(federation.server, "stranger", stranger.node_key.with_suffix(".pub"))
    wait_for_round(federation, "outputs/kills", 2)
    os.kill(federation.program_pid("server", "superlink"), signal.SIGKILL)
    wait_for("the late site takes part", lambda: "stranger" in last_taken(federation, "outputs/kills"), 400)
    federation.running.pop("stranger").end()
    wait_for("the site is revoked", lambda: revoked(federation, "stranger"), 60, 2.0)
    refusals = refused(federation, "stranger")
    federation.start_stranger("stranger")
    output = follow(federation.server, run, resolve(settings), print, patience_s=900)
    summary = summary_of(output)
    taken, missing = summary["rounds_taken_part"], summary["rounds_missing"]
    assert len(taken) == ROUNDS
    assert all({"site-1", "site-2"} <= set(sites) for sites in taken)
    assert "site-3" in missing[1]  # it was killed in mid-round
    came = next(number for number, sites in enumerate(taken) if "stranger" in sites)
    assert came >= 1
    assert "stranger" not in [*missing[0], *taken[0]]  # it was not there yet
    assert "stranger" in missing[ROUNDS - 1]  # it had left
    wait_for("the revoked site is refused", lambda: refused(federation, "stranger") > refusals, 400)
    federation.running.pop("stranger").end()
    for name, site in {**federation.sites, "stranger": stranger}.items():
        used = sum(name in sites for sites in taken)
        charged = charged_events(site, summary["run"])
        if name in {"site-1", "site-2"}:
            assert charged == 1 + ROUNDS
        elif name == "site-3":
            assert 1 + used <= charged <= 1 + ROUNDS  # statistics, and each round that was used
        else:
            assert used <= charged <= used + 1  # it came after the statistics


def last_taken(federation: Federation, output: str) -> tuple[str, ...]:
    """The sites of a run's last round."""
    try:
        return load_checkpoint(federation.server.work / output)[1].taken_part[-1]
    except Exception:
        return ()


def refused(federation: Federation, name: str) -> int:
    """How often a node was refused for its key, by its supervisor's word."""
    return (federation.root / f"{name}.out").read_text().count("refuses this node's key")


def revoked(federation: Federation, name: str) -> bool:
    """Revoke a site; False while the server can't be asked."""
    try:
        revoke(federation.server, name)
    except FederationError:
        return False
    return True


def make_strangers(federation: Federation) -> dict[str, SiteFolder]:
    """Two sites that must not get in: one whose key nobody registered, one that trusts another authority."""
    strangers = {name: clone_site(federation, name) for name in ("stranger", "deceived")}
    make_authority(strangers["deceived"].path / "other", "other")
    shutil.copy(strangers["deceived"].path / "other" / "ca.crt", strangers["deceived"].path / "ca.crt")
    return strangers


def clone_site(federation: Federation, name: str) -> SiteFolder:
    """A site's folder with a key that the server does not know."""
    folder = federation.root / name
    shutil.copytree(
        federation.sites["site-1"].path, folder, ignore=shutil.ignore_patterns("keys", "logs", ".flwr", "bin", "run")
    )
    # a witness of its own, or its ledger would be held against what site-1 released
    witness = Path(load_policy(folder / "policy.toml").witness).parent
    shutil.copytree(witness, folder.with_name(f"{name}-witness"))
    policy = (folder / "policy.toml").read_text().replace(str(witness), str(folder.with_name(f"{name}-witness")))
    (folder / "policy.toml").write_text(policy)
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
