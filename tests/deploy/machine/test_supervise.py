"""Supervision: restarts without limit, and nothing left behind, however the supervisor ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.machine import supervise as module
from deploy.machine.supervise import Program, last_reason, supervise
from tests.deploy.site.warm.warm_cases import PATIENCE_S, lives, wait


def test_supervise_starts_a_failing_program_again_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.05)
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    stop, lines = threading.Event(), []

    def tell(line: str) -> None:
        lines.append(line)
        if sum("started" in one for one in lines) >= 6:
            stop.set()

    program = Program(
        "node", ("/bin/sh", "-c", "echo CERTIFICATE_VERIFY_FAILED; exit 1"), tmp_path / "logs" / "node.log"
    )
    supervise([program], dict(os.environ), tmp_path, stop, tell, tmp_path / "alive")
    ended = [line for line in lines if "ended with 1" in line]
    assert len(ended) >= 5
    assert "not signed by the authority" in ended[0]
    assert (tmp_path / "alive").is_file()
    assert (tmp_path / "logs" / "node.log").stat().st_mode & 0o077 == 0


def test_supervise_ends_its_programs_when_told(tmp_path: Path) -> None:
    stop, pids = threading.Event(), []

    def tell(line: str) -> None:
        if "process" in line:
            pids.append(int(line.split("process ")[1].rstrip(")")))
            stop.set()

    supervise([Program("sleeper", ("sleep", "600"), tmp_path / "s.log")], dict(os.environ), tmp_path, stop, tell)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_supervised_programs_end_with_a_killed_supervisor(tmp_path: Path) -> None:
    code = f"""
import os, threading
from pathlib import Path
from deploy.machine.supervise import Program, supervise
supervise([Program("sleeper", ("sleep", "600"), Path({str(tmp_path / "s.log")!r}))], dict(os.environ), Path("/"),
          threading.Event(), lambda line: print(line, flush=True))
"""
    root = str(Path(module.__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    pid = int(process.stdout.readline().split("process ")[1].rstrip(")\n"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait(lambda: not lives(pid))


@pytest.mark.parametrize(("text", "words"), [
    ("E CERTIFICATE_VERIFY_FAILED: unable", "authority"), ("[code: 2004] refused", "refuses this node's key"),
    ("fine", ""),
])  # fmt: skip
def test_last_reason_reads_the_end_of_a_log(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "log").write_text("code: 2004\n" + "x" * 7000 + text)
    assert words in last_reason(tmp_path / "log")
    assert bool(last_reason(tmp_path / "log")) == bool(words)


def test_signals_set_the_event_whoever_holds_its_lock() -> None:
    """A handler that set it would wait for the very thread that it runs in: here the main thread holds the lock."""
    code = """
import os, signal, threading, time
from deploy.machine.supervise import stop_on_signals
stop = threading.Event()
stop_on_signals(stop)
with stop._cond:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
assert stop.wait(10)
print("stopped")
"""
    root = str(Path(module.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=PATIENCE_S, check=False
    )
    assert done.stdout == "stopped\n", done.stderr
