"""Five hosts, as network namespaces: a server and four sites. The link of one is cut for two rounds, and restored."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config.presets import resolve
from common.config.run import Scalar
from deploy.coordinator.run import follow, start_run
from deploy.machine.supervise import end_processes
from server_app.checkpoint import load_checkpoint
from tests.integration.federation_cases import Federation, demo_data, wait_for

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(1800)]
SITES = 4
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def ip(*words: str, prefix: list[str] | None = None) -> None:
    subprocess.run([*(prefix or []), "ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, list[str]]]:
    """Put this thread, and so the server, into a network of its own, with a cable to each of four others.

    Yields the command prefixes that enter the sites' networks. Everything ends with the processes that hold it.
    """
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and the ip command, to make network namespaces")
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    if _LIBC.unshare(_CLONE_NEWNET) != 0:
        os.close(before)
        pytest.skip("this machine lets nobody make network namespaces")
    holders: list[subprocess.Popen[bytes]] = []
    try:
        ip("link", "set", "lo", "up")
        prefixes: dict[str, list[str]] = {}
        for number in range(1, SITES + 1):
            holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
            holders.append(holder)
            own = Path("/proc/thread-self/ns/net").readlink()
            wait_for(
                "a network", lambda pid=holder.pid, own=own: Path(f"/proc/{pid}/ns/net").readlink() != own, 10, 0.05
            )
            enter = ["nsenter", "--target", str(holder.pid), "--net"]
            ip("link", "add", f"to-{number}", "type", "veth", "peer", "name", f"site-{number}")
            ip("link", "set", f"site-{number}", "netns", str(holder.pid))
            ip("addr", "add", f"10.77.{number}.1/24", "dev", f"to-{number}")
            ip("link", "set", f"to-{number}", "up")
            ip("link", "set", "lo", "up", prefix=enter)
            ip("addr", "add", f"10.77.{number}.2/24", "dev", f"site-{number}", prefix=enter)
            ip("link", "set", f"site-{number}", "up", prefix=enter)
            ip("route", "add", "10.77.0.1", "via", f"10.77.{number}.1", prefix=enter)
            prefixes[f"site-{number}"] = enter
        ip("addr", "add", "10.77.0.1/32", "dev", "lo")  # the server's one address, whichever cable leads to it
        yield prefixes
    finally:
        _LIBC.setns(before, _CLONE_NEWNET)
        os.close(before)
        end_processes(holders)


def test_network_cut_for_two_rounds_and_restored_ends_in_a_completed_run(
    hosts: dict[str, list[str]], tmp_path: Path
) -> None:
    federation = Federation(tmp_path, SITES, data=demo_data(SITES, 200), server_name="10.77.0.1")
    federation.prefix = hosts
    settings: dict[str, Scalar] = {
        "num-rounds": 5, "num-sites": SITES, "min-sites": 3, "round-timeout": 400.0, "epsilon": 2.0,
        "synthetic-rows": 500, "meta-steps": 20,
    }  # fmt: skip

    def rounds() -> list[dict[str, str]]:
        try:
            return [dict(one) for one in load_checkpoint(federation.server.work / "outputs" / "run")[1].missing]
        except Exception:
            return []

    try:
        federation.bring_up()
        run = start_run(federation.server, federation.app, resolve(settings))
        wait_for("a first round", lambda: len(rounds()) >= 1, 600)
        ip("link", "set", "to-2", "down")
        wait_for("two rounds without site-2", lambda: sum("site-2" in one for one in rounds()) >= 2, 600)
        ip("link", "set", "to-2", "up")
        output = follow(federation.server, run, resolve(settings), print, patience_s=900)
        federation.wait_online(*federation.sites)  # it came back by itself
    finally:
        federation.end()
    summary = json.loads((output / "summary.json").read_text())
    taken = summary["rounds_taken_part"]
    assert len(taken) == 5
    assert sum("site-2" not in sites for sites in taken) >= 2
    assert all({"site-1", "site-3", "site-4"} <= set(sites) for sites in taken)
