"""A real federation on loopback for the tests: provisioned, with one process tree for the server and one per site."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from client_app.ledger import upkeep
from client_app.ledger.ledger import Ledger
from client_app.policy.policy import load_policy
from common.config.run import Scalar
from deploy.coordinator.folder import ServerFolder
from deploy.coordinator.provision import FederationPlan, provision
from deploy.coordinator.registry import list_sites, register
from deploy.machine.app_package import build_package, digest_of
from deploy.machine.environment import SETTINGS
from deploy.site.folder import SiteFolder
from deploy.site.set_up import init_site
from server_app.checkpoint import load_checkpoint
from tests.ports import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("common", "server_app", "client_app", "embeddings")
RUN_EPSILON = 3.0
ROUNDS = 5
RUN_SETTINGS: dict[str, Scalar] = {
    "num-rounds": ROUNDS,
    "num-sites": 3,
    "min-sites": 2,
    "round-timeout": 400.0,
    "epsilon": 2.0,
    "synthetic-rows": 500,
    "meta-steps": 20,
}


def wait_for(what: str, test: Callable[[], bool], seconds: float, every: float = 0.3) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if test():
            return
        time.sleep(every)
    raise AssertionError(f"not within {seconds:g} s: {what}")


def environment() -> dict[str, str]:
    """Of the nodes: one thread each, and compiled files kept, since every message starts a Python."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **SETTINGS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


class Process:
    """A node in a process group of its own, so that the whole of it can be killed at once."""

    def __init__(self, verb: list[str], folder: Path, output: Path, prefix: Sequence[str] = ()) -> None:
        self._log = output.open("ab")
        self.output = output
        self._below: list[int] = []
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "deploy.cli", *verb, str(folder)],
            cwd=folder, env=environment(), stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL to the node and everything it started, in whatever group: as when the machine dies."""
        below = [*self._below, *descendants_of(self.process.pid)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        kill_all(below)
        self.process.wait()
        self._log.close()

    def end(self) -> None:
        """End as systemd would."""
        self.ask_to_end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def ask_to_end(self) -> None:
        """SIGTERM."""
        if self.process.poll() is None:
            self._below = descendants_of(self.process.pid)  # Flower's apps outlive the program that started them
            self.process.terminate()


class Federation:
    """A provisioned server and its sites."""

    def __init__(self, root: Path, sites: int, *, data: Callable[[Path, int], None], server_name: str = "127.0.0.1"):
        self.root = root
        self.prefix: dict[str, list[str]] = {}
        ports = free_ports(3 + 2 * sites)
        names = [f"site-{number + 1}" for number in range(sites)]
        plan = FederationPlan(
            name="trial", server_names=[server_name], sites=names,
            fleet_port=ports[0], control_port=ports[1], health_port=ports[2],
        )  # fmt: skip
        provision(plan, root / "out")
        self.server = ServerFolder(root / "out" / "server")
        self.app = copy_app(root / "app")
        self.digest = digest_of(build_package(self.app))
        self.sites: dict[str, SiteFolder] = {}
        for number, name in enumerate(names):
            folder = root / "out" / "sites" / name
            text = (folder / "site.toml").read_text()
            text = text.replace("runtime_port = 9094", f"runtime_port = {ports[3 + 2 * number]}")
            text = text.replace("health_port = 9095", f"health_port = {ports[4 + 2 * number]}")
            (folder / "site.toml").write_text(text)
            init_site(
                folder, f"trial/{name}", lifetime_epsilon=20.0, lifetime_delta=1e-5, run_epsilon=RUN_EPSILON * 1.2,
                max_clip_norm=10.0, min_noise_multiplier=0.01, data_is_public=True, metrics_may_leave=True,
                approved_app_digests=(self.digest,),
            )  # fmt: skip
            data(folder / "site.parquet", number)
            self.sites[name] = SiteFolder(folder)
        self.strangers: dict[str, SiteFolder] = {}
        self.running: dict[str, Process] = {}

    def start_server(self) -> None:
        self.running["server"] = Process(["server", "start"], self.server.path, self.root / "server.out")
        port = self.server.settings.fleet_port
        wait_for("the server listens", lambda: listens(port), 300)
        wait_for("the control port listens", lambda: listens(self.server.settings.control_port), 30)

    def bring_up(self) -> None:
        """Start the server, then the sites."""
        self.start_server()
        self.bring_sites()

    def bring_sites(self, *names: str) -> None:
        """Register every site; start those that are named, or all, and wait until they are connected."""
        for name, site in self.sites.items():
            register(self.server, name, site.node_key.with_suffix(".pub"))
        for name in names or self.sites:
            self.start_site(name)
        self.wait_connected(*(names or self.sites))

    def start_site(self, name: str) -> None:
        start, output = ["site", "start", "--no-check"], self.root / f"{name}.out"
        self.running[name] = Process(start, self.sites[name].path, output, self.prefix.get(name, ()))

    def start_stranger(self, name: str) -> None:
        start, output = ["site", "start", "--no-check"], self.root / f"{name}.out"
        self.running[name] = Process(start, self.strangers[name].path, output)

    def wait_connected(self, *names: str, seconds: float = 400) -> None:
        """Wait for the nodes' own word, which costs nothing to read, unlike the server's."""
        for name in names:
            log = self.sites[name].path / "logs" / "supernode.log"
            wait_for(f"{name} connects", lambda log=log: _connected(log), seconds)

    def wait_online(self, *names: str, seconds: float = 400) -> None:
        wait_for(
            f"{names} online",
            lambda: {one.name for one in list_sites(self.server) if one.status == "online"} >= set(names),
            seconds,
            3.0,
        )

    def end(self) -> None:
        for process in self.running.values():
            process.ask_to_end()
        for process in self.running.values():
            process.end()

    def program_pid(self, name: str, program: str) -> int:
        """Process id of a program under a node's supervisor, by the supervisor's own word."""
        text = (self.root / f"{name}.out").read_text()
        return int(re.findall(rf"{program} started \(process (\d+)\)", text)[-1])


def _connected(log: Path) -> bool:
    """Whether the node that was started last has got its identity from the server."""
    try:
        return "SuperNode ID" in log.read_text(errors="replace").rsplit(" starting supernode", 1)[-1]
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """Direct children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in (task / "children").read_text().split()]
    return [child for child in found if _lives(child)]


def descendants_of(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    children = children_of(pid)
    return [*children, *(below for child in children for below in descendants_of(child))]


def kill_all(pids: Sequence[int]) -> None:
    """SIGKILL to those that are left."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Whether a process is there and no mere entry that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def listens(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(0.5)
        return one.connect_ex(("127.0.0.1", port)) == 0


def copy_app(target: Path) -> Path:
    """A copy of the app's own files, so that its digest does not depend on who edits what meanwhile."""
    target.mkdir(parents=True)
    shutil.copy(REPOSITORY / "pyproject.toml", target)
    for part in PARTS:
        shutil.copytree(REPOSITORY / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    return target


def demo_data(num_sites: int, rows: int) -> Callable[[Path, int], None]:
    """Writes a site's share of the demonstration's embeddings, at most `rows` of them."""
    import numpy as np

    from embeddings.simulation.simulated import load_pool, load_site
    from embeddings.store.writing import write_store

    cache = Path(os.environ.get("FEDHYPEVAE_TEST_CACHE", str(REPOSITORY / "outputs" / "cache")))
    try:
        pool = load_pool(cache)
    except Exception as error:
        pytest.skip(f"no demo embeddings: {error}")

    def write(path: Path, number: int) -> None:
        site = load_site(pool, number, num_sites, None, 2026)
        write_store(path, site.take(np.arange(min(rows, len(site.labels)))))

    return write


@contextlib.contextmanager
def running(federation: Federation) -> Iterator[Federation]:
    try:
        yield federation
    finally:
        federation.end()


def rounds_done(federation: Federation, output: str) -> int:
    try:
        return load_checkpoint(federation.server.work / output)[0].round
    except Exception:
        return -1


def wait_for_round(federation: Federation, output: str, number: int) -> None:
    wait_for(f"{number} rounds of {output}", lambda: rounds_done(federation, output) >= number, 600)


def summary_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


def charged_events(site: SiteFolder, run: str) -> int:
    """How many events a site's ledger holds against a run; opening it checks its whole chain."""
    policy = load_policy(site.path / "policy.toml")
    with Ledger.open(policy.ledger_path(site.path), policy.cohort_id, read_only=True) as ledger:
        spent = upkeep.spent(ledger, policy.lifetime_delta)
        assert spent.epsilon <= policy.lifetime_epsilon
        return sum(event.count for event in ledger.runs[run].charged)
