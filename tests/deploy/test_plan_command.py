"""`fedhypevae plan` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import ConfigError
from deploy.cli import app
from deploy.commands.plan import _worth

SMALL = ["--sites", "3", "--records", "50", "--dim", "8", "--classes", "3", "--rounds", "2"]


def test_plan_command_says_what_it_can_without_public_embeddings(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", *SMALL, "--epsilon", "1", "--cache", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for words in ("noise multiplier", "PLD", "PRV", "RDP", "bytes of each site", "signal", "nothing is spent"):
        assert words in done.output
    assert "run `fedhypevae demo` once" in done.output
    assert list(tmp_path.iterdir()) == []


def test_plan_command_prints_json(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", *SMALL, "--json", "--no-simulation", "--set", "sampling-rate=1"])
    facts = json.loads(done.stdout)
    assert facts["steps"] == 3
    assert facts["epsilon"][-1]["pld"] <= 3.0
    assert "score" not in facts


@pytest.mark.parametrize(
    "wrong", [["--set", "clip-nrom=1"], ["--epsilon", "-1"], ["--sites", "0"], ["--set", "method=fedavg"]]
)
def test_plan_command_refuses_wrong_settings(wrong: list[str]) -> None:
    done = CliRunner().invoke(app, ["plan", *SMALL, "--no-simulation", *wrong])
    assert isinstance(done.exception, ConfigError)


@pytest.mark.parametrize(
    ("alone", "least", "words"),
    [(0.82, 200, "not to a site"), (0.75, 200, "from about 200 records at each of 3 sites"), (0.6, None, "at no size")],
)
def test_plan_calls_no_run_worth_it_where_one_site_alone_is_better(alone: float, least: int | None, words: str) -> None:
    scores = {"one_site_by_itself": {"balanced_accuracy": alone}, "synthetic_only": {"balanced_accuracy": 0.8}}
    facts = {
        "score": scores,
        "worth_it_from_records_per_site": least,
        "worth_it_means_balanced_accuracy": 0.79,
    }
    assert _worth(facts, 3).startswith(words)


def test_plan_command_help_has_an_example() -> None:
    assert "Example" in CliRunner().invoke(app, ["plan", "--help"]).output
