"""Rounds of our app and of the do-nothing app: real processes on loopback, and Flower's simulation engine."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.floor_app import write_app
from benchmarks.message_cost import CLASSES, DIM, NAMES, SETTINGS, make_sites
from benchmarks.server import engine
from common.config.presets import as_expert, resolve
from common.config.run import RunConfig
from common.methods import get_method
from common.methods.base import Problem, RunContext
from deploy.machine.environment import flower_environment, tool
from deploy.site.warm import client as warm_client

_REPOSITORY = Path(__file__).resolve().parents[1]
_LIMIT_S = 900.0
# a site's starter without its guard, since no app is approved here
_STARTER = """
import sys
from functools import partial
from pathlib import Path
from deploy.site.warm.starter import serve
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
serve(Path(sys.argv[1]), flwr_clientapp)
"""


def loopback_rounds(work: Path, sites: int, rounds: int) -> dict[str, Any]:
    """Seconds a round of both apps on one SuperLink and `sites` SuperNodes, each a process, over gRPC without TLS.

    Flower's nodes start a fresh process for each message: so runs the floor, and our app too (`cold`). Then the nodes
    are started anew with a warm starter each, as `fedhypevae site start` does it, and our app runs on those.
    """
    floor, environment = _prepare(work, sites)
    folders = make_sites(work / "sites", sites)
    ports = _free_ports(2 + 2 * sites)
    control, fleet = f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
    with contextlib.ExitStack() as stack:
        link = [tool("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(ports[0])]
        link += ["--fleet-api-type", "grpc-rere", "--fleet-api-address", fleet]
        stack.enter_context(_running([*link, "--disable-runtime-dependency-installation"], work / "link", environment))
        _wait_for_port(ports[0])
        home = Path(environment["FLWR_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(f'[superlink.bench]\naddress = "{control}"\ninsecure = true\n')
        settings = {**SETTINGS, "synthetic-rows": 110, "num-sites": sites, "min-sites": sites, "num-rounds": rounds}
        settings |= {"tracking": "off", "round-timeout": 600.0, "spare-rounds": 0}
        seconds = {}
        for kind in ("cold", "warm"):
            with _nodes(work / kind, folders, fleet, ports[2:], environment, warm=kind == "warm"):
                if kind == "cold":
                    _flwr_run(floor, "bench", environment, work, {"rounds": rounds, "sites": sites})
                told = {**settings, "run-name": kind, "output-dir": f"outputs/{kind}"}
                _flwr_run(_REPOSITORY, "bench", environment, work, {"expert": as_expert(resolve(told))})
            summary = json.loads((work / "outputs" / kind / "summary.json").read_text(encoding="utf-8"))
            seconds[kind] = [entry["seconds"] for entry in summary["history"]]
    base = json.loads((work / "floor.json").read_text())
    return {**_compare(base, seconds["warm"]), "cold": _compare(base, seconds["cold"])}


@contextlib.contextmanager
def _nodes(
    work: Path, folders: Sequence[Path], fleet: str, ports: Sequence[int], environment: Mapping[str, str], *, warm: bool
) -> Iterator[None]:
    """One SuperNode a site; with `warm`, each with a starter whose forks run its messages."""
    with contextlib.ExitStack() as stack:
        for number, folder in enumerate(folders):
            own, logs = [str(port) for port in ports[2 * number : 2 * number + 2]], work / folder.name
            node = [tool("flower-supernode"), "--insecure", "--grpc-rere", "--superlink", fleet, "--port", own[0]]
            node += ["--health-server-address", f"127.0.0.1:{own[1]}"]
            node += ["--node-config", f'data-dir="{folder}" site-name="{folder.name}"']
            surroundings = {**environment, "FLWR_HOME": str(logs / ".flwr")}
            if warm:
                socket_folder, commands = logs / "run", logs / "bin"
                commands.mkdir(parents=True)
                client = [sys.executable, "-I", "-S", str(Path(warm_client.__file__)), str(socket_folder)]
                (commands / "flwr-clientapp").write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
                (commands / "flwr-clientapp").chmod(0o755)
                surroundings["PATH"] = f"{commands}:{surroundings['PATH']}"
                starter = [sys.executable, "-P", "-c", _STARTER, str(socket_folder)]
                stack.enter_context(_running(starter, logs / "starter", surroundings))
                _wait_until(partial(Path.exists, socket_folder / warm_client.SOCKET), "the warm starter")
            stack.enter_context(_running(node, logs, surroundings))
        yield


def simulated_rounds(work: Path, sites: int, rounds: int) -> dict[str, Any]:
    """Seconds a round of both apps in Flower's simulation engine on Ray, one core a site."""
    from deploy.simulation.superlink import own_superlink

    floor, environment = _prepare(work, sites)
    with own_superlink(work) as own:
        more = ["--federation-config", f"num-supernodes={sites} client-resources-num-cpus=1"]
        environment["FLWR_HOME"] = own["FLWR_HOME"]
        _flwr_run(floor, "local", environment, work, {"rounds": rounds, "sites": sites}, more)
    ours = engine(sites, rounds, work)
    return _compare(json.loads((work / "floor.json").read_text()), ours["seconds_each"])


def _prepare(work: Path, sites: int) -> tuple[Path, dict[str, str]]:
    """The floor's app with the bytes of a round of ours, and the environment of Flower's processes."""
    method = get_method("fedhypevae")
    config = RunConfig.from_flat({"num-sites": sites, "epsilon": float("inf")})
    context = RunContext(config, Problem(DIM, NAMES[:CLASSES], sites), method.plan(config))
    down = {name: tuple(value.shape) for name, value in method.init(context).params.items()}
    work.mkdir(parents=True)
    floor = write_app(work / "floor-app", down, dict(method.upload_shapes(context)))
    environment = flower_environment(work)
    environment |= {"FLWR_HOME": str(work / ".flwr"), "FLOOR_SECONDS": str(work / "floor.json")}
    return floor, {**environment, "OMP_NUM_THREADS": "1"}


def _compare(floor: list[float], ours: list[float]) -> dict[str, Any]:
    """Medians of both; the first round of each also starts things, and is left out where there are others."""
    floor, ours = floor[1:] or floor, ours[1:] or ours
    base = statistics.median(floor)
    return {
        "floor_seconds": [round(one, 2) for one in floor],
        "ours_seconds": [round(one, 2) for one in ours],
        "over_floor": round(statistics.median(ours) / base - 1, 3),
        "spread": [round(min(ours) / base - 1, 3), round(max(ours) / base - 1, 3)],
    }


def _flwr_run(
    app: Path,
    federation: str,
    environment: Mapping[str, str],
    work: Path,
    settings: Mapping[str, str | int | float | bool],
    more: list[str] | None = None,
) -> None:
    """`flwr run` to its end (RuntimeError with its last words, if it fails)."""
    told = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    words = [tool("flwr"), "run", str(app), federation, "--stream", "--run-config", told, *(more or [])]
    done = subprocess.run(
        words, env=dict(environment), cwd=work, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    words = [tool("flwr"), "ls", federation, "--format", "json", "--limit", "1"]
    end = time.monotonic() + 60
    while True:
        seen = subprocess.run(words, env=dict(environment), cwd=work, capture_output=True, text=True, check=False)
        status = str(json.loads(seen.stdout)["runs"][0]["status"]) if seen.returncode == 0 else seen.stderr
        if status.startswith("finished") or time.monotonic() > end:
            break
        time.sleep(1)
    if status != "finished:completed":
        status_file = work / "outputs" / "run" / "status.json"
        why = status_file.read_text(encoding="utf-8") if status_file.is_file() else "no status.json"
        raise RuntimeError(f"the run of {app.name} ended as {status}: {why}\n{(done.stdout + done.stderr)[-3000:]}")


@contextlib.contextmanager
def _running(words: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """A process in a folder of its own, ended by its process id afterwards."""
    log.mkdir(parents=True, exist_ok=True)
    with (log / "output").open("w") as output:
        process = subprocess.Popen(words, env=dict(environment), cwd=log, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_port(port: int) -> None:
    def listens() -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    _wait_until(listens, f"a listener on port {port}")


def _wait_until(test: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            raise RuntimeError(f"no sign of {what} after {seconds:g} s")
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
