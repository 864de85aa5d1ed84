"""`fedhypevae demo`: wrong input ends with one line and code 2, before anything is started or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError
from deploy.simulation.demonstration import clear_output, why_no_scores
from deploy.simulation.simulate import show_lines

TOOL = Path(sys.executable).parent / "fedhypevae"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epsilon", "0"], "epsilon"),
        (["--rounds", "-3"], "num-rounds"),
        (["--set", "latent-dimm=3"], "did you mean latent-dim"),
        (["--set", "mmd-weight=0"], "mmd"),
        (["--set", "nonsense"], "KEY=VALUE"),
        (["--set", "min-sites=9"], "min-sites"),
        (["--resume"], "no checkpoint"),
    ],
)
def test_demo_refuses_wrong_input_with_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    environment = {**os.environ, "FEDHYPEVAE_HOME": str(tmp_path)}
    done = subprocess.run(
        [TOOL, "demo", *arguments], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_clear_output_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "photos"
    for folder, name in ((run, "status.json"), (other, "holiday.jpg")):
        folder.mkdir()
        (folder / name).write_text("{}")
    clear_output(tmp_path / "missing")
    clear_output(run)
    assert not run.exists()
    with pytest.raises(ConfigError, match="no run made"):
        clear_output(other)
    assert (other / "holiday.jpg").is_file()


def test_show_lines_keeps_the_runs_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["\x1b[92mINFO \x1b[0m:      Starting\n", "round 1/2   sites 4/4\n", "\n", "error: broken\n"]
    tail = show_lines(lines, verbose=False)
    assert capsys.readouterr().out == "round 1/2   sites 4/4\n"
    assert len(tail) == 4


def test_the_reason_for_no_scores_is_the_one_that_holds() -> None:
    assert "not declared public" in why_no_scores({"privacy": {"data_is_public": False}})
    assert "left to test on" in why_no_scores({"privacy": {"data_is_public": True}})
