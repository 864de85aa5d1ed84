"""A SuperLink of a simulation's own: its port, its state and its files are no other run's, and all of it ends with it.

`flwr run . local` shares one SuperLink, on one port, among all that run on a machine, and keeps its state in a
database: two runs at once would meet there, and a start that was cut off (Flower waits 15 seconds) leaves a database
that no later start can use.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import FedHypeVAEError
from deploy.machine.environment import flower_environment, tool
from deploy.machine.supervise import end_with_parent

_START_S = 300.0  # a busy machine or a cold disk takes a minute for the imports alone


@contextmanager
def own_superlink(work_folder: Path) -> Iterator[dict[str, str]]:
    """Start a SuperLink for simulations, and end it and whatever it started afterwards.

    Args:
        work_folder: where the runs' results and caches go.

    Yields:
        The environment in which `flwr ... local` talks to it.

    Raises:
        FedHypeVAEError: it did not start; the text has its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="fedhypevae-flower-") as home:
        port = _free_port()
        environment = {**flower_environment(work_folder), "FLWR_HOME": home}
        config = f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (Path(home) / "config.toml").write_text(config, encoding="utf-8")
        log = Path(home) / "superlink.log"
        command = [tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, cwd=work_folder, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        try:
            _wait(process, port, log)
            yield environment
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_S
    while not _answers(port):
        if process.poll() is not None or time.monotonic() >= end:
            last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            how = f"did not start within {_START_S:g} s" if process.poll() is None else f"ended with {process.poll()}"
            raise FedHypeVAEError(f"Flower's SuperLink {how}; its last lines:\n{last}")
        time.sleep(0.2)


def _answers(port: int) -> bool:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        link.request("GET", "/health")
        return link.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and the group of processes that it leads: politely first, then for good."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
