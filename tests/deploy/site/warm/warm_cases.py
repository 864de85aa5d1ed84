"""Warm starters for the tests: real processes whose children do what a test says, and a cold way that leaves a mark."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from deploy.site.app_guard import guard_folder

ROOT = Path(__file__).resolve().parents[4]
COLD = 3
PATIENCE_S = 120.0  # for what a quiet machine does in a second or two, and a crowded one does late
_SCRIPT = """
import json, os, random, signal, subprocess, sys, threading, time
from pathlib import Path
import deploy.site.warm.starter, deploy.site.warm.child
{before}

def run():
    with open(os.environ["RAN"], "a") as file:
        file.write("warm\\n")
    {body}

deploy.site.warm.starter.serve(Path(sys.argv[1]), run, {modules!r})
"""
_FAKE_GUARD = f"""
import os, sys
with open(os.environ["RAN"], "a") as file:
    file.write("cold\\n")
sys.exit({COLD})
"""

# The site's own check, with Flower's part of a message that brings a package which nobody approved.
GUARDED = """
import io, types, zipfile
from flwr.supercore.fab import Fab
from flwr.supernode.runtime import run_clientapp
content = io.BytesIO()
with zipfile.ZipFile(content, "w") as archive:
    archive.writestr("pyproject.toml", "")
fab = types.SimpleNamespace(content=content.getvalue(), hash_str="0" * 64)
run_clientapp.pull_task_input = lambda client: (None, None, types.SimpleNamespace(run_id=1), fab)
run_clientapp.HeartbeatSender = lambda _: types.SimpleNamespace(start=lambda: None, is_running=False)
run_clientapp.push_task_output = lambda **told: print(told["details"], flush=True)
run_clientapp.install_from_fab = lambda *_, **__: print("INSTALLED", flush=True)
import importlib.util
found = importlib.util.spec_from_file_location("real_guard", {path!r})
guard = importlib.util.module_from_spec(found)
found.loader.exec_module(guard)
"""


class Place:
    """A site's folder with its commands, and an environment in which the cold way only leaves a mark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.ran = folder / "ran"
        fake = folder / "fake" / "deploy"
        (fake / "site").mkdir(parents=True)
        (fake / "__init__.py").write_text(f"__path__.append({str(ROOT / 'deploy')!r})\n")
        (fake / "site" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'deploy' / 'site')!r})\n")
        (fake / "site" / "app_guard.py").write_text(_FAKE_GUARD)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        path = os.pathsep.join((str(fake.parent), str(ROOT)))
        self.environment = {**kept, "PYTHONPATH": path, "RAN": str(self.ran)}
        self.command = guard_folder(folder, self.run) / "flwr-clientapp"

    @contextlib.contextmanager
    def starter(self, body: str, *, before: str = "", modules: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
        """A starter whose children run `body`; killed in the end."""
        script = _SCRIPT.format(body=body.replace("\n", "\n    "), before=before, modules=tuple(modules))
        command = [sys.executable, "-P", "-c", script, str(self.run)]
        log = self.folder / "starter.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            wait(lambda: "ready: " in log.read_text() or process.poll() is not None)
            yield process
        finally:
            process.kill()
            process.wait()

    @property
    def said(self) -> str:
        """What the starter wrote."""
        return (self.folder / "starter.log").read_text()

    def client(self, *arguments: str, more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """A message, as SuperExec starts one."""
        return subprocess.Popen(
            [self.command, *arguments], env={**self.environment, **(more or {})}, cwd=self.folder, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def message(self, *arguments: str, more: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Exit code, output and errors of a message."""
        process = self.client(*arguments, more=more)
        output, errors = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output, errors

    def marks(self) -> list[str]:
        """How messages were run so far."""
        return self.ran.read_text().split() if self.ran.exists() else []


def wait(test: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


def lives(process: int) -> bool:
    """Whether a process is there and no mere entry that nobody has asked about."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
