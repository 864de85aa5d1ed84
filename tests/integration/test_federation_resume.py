"""A real server and three real sites: the ServerApp is killed and its run resumed, while one site sends garbage."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config.presets import resolve
from deploy.coordinator.run import follow, start_run
from deploy.machine.supervise import end_processes
from tests.integration.federation_cases import (
    REPOSITORY,
    ROUNDS,
    RUN_SETTINGS,
    Federation,
    charged_events,
    children_of,
    demo_data,
    kill_all,
    rounds_done,
    running,
    summary_of,
    wait_for_round,
)

pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Two honest sites are up; the third is registered alone."""
    with running(Federation(tmp_path / "federation", 3, data=demo_data(3, 300))) as made:
        made.start_server()
        made.bring_sites("site-1", "site-2")
        yield made


def test_federation_resumes_after_the_server_app_is_killed_and_takes_no_garbage(federation: Federation) -> None:
    # unpacked, so that each kind of garbage is seen for what it is; packed garbage is tested at the exchange
    settings = {**RUN_SETTINGS, "output-dir": "outputs/resumed"}
    with rogue(federation, "site-3"):
        run = start_run(federation.server, federation.app, resolve(settings))
        wait_for_round(federation, "outputs/resumed", 2)
        executor = federation.program_pid("server", "server-app")
        (server_app,) = children_of(executor)
        os.kill(server_app, signal.SIGKILL)
        with pytest.raises(Exception, match="--resume"):
            follow(federation.server, run, resolve(settings), print, patience_s=300)
        done = rounds_done(federation, "outputs/resumed")
        again = {**settings, "resume": True}
        run = start_run(federation.server, federation.app, resolve(again))
        output = follow(federation.server, run, resolve(again), print, patience_s=900)
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


@contextlib.contextmanager
def rogue(federation: Federation, name: str) -> Iterator[None]:
    """A site under whose key a program sends garbage."""
    site = federation.sites[name]
    commands, logs = federation.root / "rogue-bin", site.path / "logs"
    for folder in (commands, logs):
        folder.mkdir(exist_ok=True)
    (commands / "flwr-clientapp").write_text(
        f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/integration/rogue_app.py "$@"\n'
    )
    (commands / "flwr-clientapp").chmod(0o755)
    environment = {**site.environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{commands}:{environment['PATH']}"
    processes = []
    try:
        for program in site.programs():
            log = (logs / f"rogue-{program.name}.log").open("ab")
            processes.append(subprocess.Popen(program.command, env=environment, cwd=site.path, stdout=log, stderr=log))
        federation.wait_online(name)
        yield
    finally:
        started = [child for process in processes for child in children_of(process.pid)]
        end_processes(processes)
        kill_all(started)  # Flower's apps outlive the program that started them
