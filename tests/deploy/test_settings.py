"""Every command starts from one configuration: the code's defaults, or a preset's named differences from them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.rows import ROWS
from common.config.presets import PRESETS, resolve_listed
from common.config.run import RunConfig
from deploy import settings
from deploy.cli import app
from deploy.coordinator.provision import FederationPlan, provision
from tests.benchmarks.small_federation import small_federation
from tests.deploy.test_app_settings import listed


class Built(Exception):
    """Ends a command where its configuration is there, before anything is started."""


def built(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> RunConfig:
    """The configuration that a command makes, by the function that it calls."""
    whole, found = settings.run_config, []

    def stop(*arguments: Any, **options: Any) -> RunConfig:
        found.append(whole(*arguments, **options))
        raise Built

    monkeypatch.setattr(settings, "run_config", stop)
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, Built), done.output
    return found[0]


@pytest.mark.parametrize("command", ["plan", "audit", "run", "demo"])
def test_commands_build_one_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    folder = tmp_path / "federation"
    provision(FederationPlan(name="ours", server_names=["localhost"], sites=["site-1"]), folder)
    words = [command, str(folder / "server")] if command == "run" else [command]
    differing = {
        key: value for key, value in built(monkeypatch, words).to_flat().items() if value != RunConfig().to_flat()[key]
    }
    assert differing == (dict(PRESETS["demo"]) if command == "demo" else {})


def test_set_takes_listed_and_expert_keys_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    config = built(monkeypatch, ["demo", "--rounds", "4", "--set", "momentum=0.5", "--set", "epsilon=1"])
    assert (config.training.num_rounds, config.training.momentum, config.privacy.epsilon) == (4, 0.5, 1.0)
    assert config.synthesis.synthetic_rows == PRESETS["demo"]["synthetic-rows"]


def test_what_a_command_hands_to_flower_makes_the_same_configuration() -> None:
    pairs = ["momentum=0.5", "run-name=Ward \"B\" 'ü' = 2", "epsilon=inf", "trust=local"]
    config = settings.run_config(pairs, "demo", num_sites=6)
    with settings.settings_file(config) as file:
        told = tomllib.loads(file.read_text(encoding="utf-8"))
    assert told.keys() <= listed().keys()
    assert resolve_listed({**listed(), **told}) == config
    assert not file.exists()


def test_the_tables_row_is_the_defaults_but_for_what_its_data_and_harness_are() -> None:
    row = next(row for row in ROWS if (row.method, row.trust) == ("fedhypevae", "local"))
    assert row.settings == {}
    config, defaults = row.config(small_federation()).to_flat(), RunConfig().to_flat()
    differing = {key for key, value in config.items() if value != defaults[key]}
    assert differing <= {"epsilon", "delta", "noise", "seed", "num-sites", "unit"}
