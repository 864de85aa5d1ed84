"""Keeps a node's programs running: restarts them without limit, waits longer after each quick end, ends them with us.

A keyed node that crashed is refused by the server for about a minute and exits each time: so no number of failures is
final. The wait between two starts grows to half a minute and falls back once a program has run for a while.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 15.0
STEADY_S = 60.0
_GRACE_S = 10.0
_POLL_S = 0.2
_TOUCH_S = 5.0
_LOG_BYTES = 20_000_000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Program:
    """One program: its name, its command line, the log its output goes to, and variables of its own."""

    name: str
    command: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class _Child:
    """A program with its present process, if any, and the time of its next start."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.next_start = 0.0
        self.wait = FIRST_WAIT_S


def supervise(
    programs: Sequence[Program],
    environment: Mapping[str, str],
    folder: Path,
    stop: threading.Event,
    tell: Callable[[str], None],
    alive: Path | None = None,
) -> None:
    """Run programs until they are to stop; then end them, by their process ids.

    Args:
        programs: what to run.
        environment: of all of them.
        folder: where they run.
        stop: set it (from a signal handler) to end.
        tell: gets one line for each start and end.
        alive: a file that is touched every few seconds, for health checks.
    """
    children, touched = [_Child(program) for program in programs], -_TOUCH_S
    try:
        while not stop.is_set():
            for child in children:
                _look_after(child, environment, folder, tell)
            if alive is not None and time.monotonic() - touched >= _TOUCH_S:
                alive.touch(mode=0o600)
                touched = time.monotonic()
            stop.wait(_POLL_S)
    finally:
        end_processes([child.process for child in children if child.process is not None])
        tell("stopped")


def end_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to end, and end those that don't."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    end = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stop_on_signals(stop: threading.Event) -> None:
    """Let SIGTERM and SIGINT set an event, in a thread of its own.

    A handler that sets it would run in the thread that waits for it, and now and then while that one holds the event's
    own lock: for ever, then.
    """
    woken, waker = os.pipe()
    os.set_blocking(waker, False)

    def pass_on() -> None:
        os.read(woken, 1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    threading.Thread(target=pass_on, daemon=True).start()


def _look_after(child: _Child, environment: Mapping[str, str], folder: Path, tell: Callable[[str], None]) -> None:
    now = time.monotonic()
    if child.process is None:
        if now >= child.next_start:
            child.process = _start(child.program, environment, folder)
            child.started = now
            tell(f"{child.program.name} started (process {child.process.pid})")
        return
    code = child.process.poll()
    if code is None:
        return
    lasted = now - child.started
    child.wait = FIRST_WAIT_S if lasted >= STEADY_S else min(child.wait * 2, LONGEST_WAIT_S)
    child.next_start = now + child.wait
    child.process = None
    reason = last_reason(child.program.log)
    tell(f"{child.program.name} ended with {code} after {lasted:.0f} s{reason}; starting it again in {child.wait:g} s")


def last_reason(log: Path) -> str:
    """What the end of a node's log says about why it ended, in words; empty if nothing known."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 6000))
            tail = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return next((f": {meaning}" for mark, meaning in _REASONS.items() if mark in tail), "")


_REASONS = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not signed by the authority in ca.crt",
    "code: 2004": "the server refuses this node's key: not registered, revoked, or still counted as online "
    "(for about a minute after a crash)",
    "Address already in use": "a port of site.toml is taken by another program",
}


def _start(program: Program, environment: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    program.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open_log(program.log) as log:
        line = f"{datetime.now(UTC).isoformat(timespec='seconds')} starting {program.name}\n"
        log.write(line.encode())
        log.flush()
        return subprocess.Popen(
            program.command,
            env={**environment, **program.environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )


def _open_log(path: Path) -> IO[bytes]:
    """A log to append to; a large one is kept once under another name."""
    with suppress(OSError):
        if path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_suffix(".old.log"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return os.fdopen(descriptor, "ab")


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies, however it dies (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
