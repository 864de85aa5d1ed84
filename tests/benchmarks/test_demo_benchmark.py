"""The demonstration's benchmark: what it makes of several runs, and the memory that it counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.demo import _members, _memory, collect, spread


def test_spread_by_hand() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "lowest": 1.0, "highest": 10.0}


def test_collect_takes_each_kind_over_the_runs() -> None:
    kinds = ("local_only", "statistics_only", "synthetic_only", "mixed", "own_lambda")
    runs = [
        {"scores": {kind: {"accuracy": value, "balanced_accuracy": value / 2} for kind in kinds}}
        for value in (0.2, 0.8, 0.6)
    ]
    scores = collect(runs)
    assert scores["mixed"]["accuracy"] == {"median": 0.6, "lowest": 0.2, "highest": 0.8}
    assert scores["mixed"]["balanced_accuracy"]["median"] == pytest.approx(0.3)


def test_members_are_found_by_their_home_and_their_memory_counted(tmp_path: Path) -> None:
    program = "import sys; held = bytearray(b'x') * (64 << 20); print('ready', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "FEDHYPEVAE_HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        mark = f"FEDHYPEVAE_HOME={tmp_path}".encode()
        assert list(_members(mark)) == [process.pid]
        assert 64 <= _memory(process.pid) < 128
    finally:
        process.communicate()
    assert list(_members(mark)) == []
