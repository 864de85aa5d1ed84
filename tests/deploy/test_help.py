"""Every command explains itself with an example, and shells can complete it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from common.errors import ConfigError, FedHypeVAEError
from deploy.cli import COORDINATOR, HOSPITAL, MOVED, RECEIVER, TRY, app


def commands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command below one, groups left out."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, (*words, name))
    else:
        yield words


EVERY = list(commands(typer.main.get_command(app)))


def test_release_shows_the_options_of_what_it_does_without_another_word() -> None:
    shown = CliRunner().invoke(app, ["release", "--help"]).output
    assert all(option in shown for option in ("verify", "--out", "--ledgers", "--force", "--license"))


def test_commands_are_found() -> None:
    assert ("release", "verify") in EVERY
    assert ("synthesize",) in EVERY
    assert len(EVERY) > 20


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_has_an_example_of_that_very_command(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "300"})
    assert done.exit_code == 0
    _, _, example = " ".join(done.output.split()).partition("Example: ")
    # `release RUN` is `release make RUN`
    assert example.startswith(f"fedhypevae {' '.join(word for word in words if word != 'make')}"), done.output


def test_every_command_stands_under_those_who_use_it() -> None:
    """Typer puts a command without a panel under "Commands", which is nobody's."""
    shown = CliRunner().invoke(app, [], env={"COLUMNS": "300"}).output
    assert "─ Commands ─" not in shown
    places = [shown.index(f"─ {panel} ─") for panel in (TRY, HOSPITAL, COORDINATOR, RECEIVER)]
    assert places == sorted(places)


@pytest.mark.parametrize(("old", "new"), MOVED.items(), ids=lambda words: " ".join(words))
def test_a_command_of_before_names_the_one_of_now(old: tuple[str, str], new: str) -> None:
    assert tuple(new.split()) in EVERY
    with pytest.raises(ConfigError, match=f"`fedhypevae {new}`"):
        CliRunner().invoke(app, [*old, "folder"], catch_exceptions=False)


def test_server_with_a_folder_names_server_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"is now `fedhypevae server start {re.escape(str(tmp_path))}`"):
        CliRunner().invoke(app, ["server", str(tmp_path)], catch_exceptions=False)


def test_version_is_the_installed_one() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"fedhypevae {metadata.version('fedhypevae')}\n")


# Wrong input for each command: none of it may start, write, or ask a network for anything.
WRONG = {
    "demo": "--set no-such-setting=1",
    "download": "no-such-set",
    "embed": "nowhere --out new.parquet",
    "provision": "nowhere.toml --out new",
    "server start": "nowhere",
    "run": "nowhere",
    "status": "nowhere",
    "plan": "--set no-such-setting=1",
    "synthesize": "nowhere --rows 5",
    "join": "nowhere --data nowhere.parquet --out new.parquet",
    "report": "nowhere",
    "evaluate": "nowhere --data nowhere.parquet",
    "train": "nowhere --out new.safetensors",
    "predict": "nowhere.safetensors nowhere.png",
    "audit": "--set no-such-setting=1",
    "doctor": "--no-such-option",
    "ledger create": "new.db",
    "data check": "nowhere.parquet",
    "data compare": "nowhere.parquet nowhere.parquet",
    "data partition": "nowhere.parquet --sites 2 --out new",
    "data import": "nowhere.npz --out new.parquet",
    "site init": "new",
    "site pin": "nowhere nowhere.toml",
    "site start": "nowhere",
    "site renew-key": "nowhere",
    "site report": "nowhere --bundle nowhere",
    "server package": "nowhere",
    "site approve": "nowhere nowhere.fab",
    "server register": "nowhere nowhere.pub",
    "server list": "nowhere",
    "server revoke": "nowhere no-such-site",
    "server rotate": "nowhere no-such-site nowhere.pub",
    "stop": "nowhere",
    "release make": "nowhere --out new",
    "release verify": "nowhere",
}
# A ledger that is not where it should be may be a lost one: a failure, not a slip of the pen.
LOST = {f"ledger {name}": "nowhere.db" for name in ("show", "verify")} | {
    "ledger export": "nowhere.db new.json",
    "ledger backup": "nowhere.db new.db",
    "ledger move": "nowhere.db new.db",
    "ledger close": "nowhere.db some-run",
    "ledger witness": "nowhere.db new.json --yes",
}


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_wrong_input_exits_with_two_and_leaves_nothing(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line on what is wrong, code 2; code 1 for what fails though it was asked for rightly."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDHYPEVAE_HOME", str(tmp_path))
    name = " ".join(words)
    wrong, due = (WRONG[name], 2) if name in WRONG else (LOST[name], 1)
    done = CliRunner().invoke(app, [*words, *wrong.split()])
    if isinstance(done.exception, FedHypeVAEError):
        assert "\n" not in str(done.exception)
        assert done.exception.exit_code == due, done.exception
    else:
        assert isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == due, done.output
    assert list(tmp_path.iterdir()) == []


def complete(shell: str, typed: str) -> str:
    """What a shell is offered after `fedhypevae TYPED`."""
    variables = {
        "bash": {"COMP_WORDS": f"fedhypevae {typed}", "COMP_CWORD": str(len(typed.split(" ")))},
        "zsh": {"_TYPER_COMPLETE_ARGS": f"fedhypevae {typed}"},
        "fish": {"_TYPER_COMPLETE_ARGS": f"fedhypevae {typed}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['fedhypevae']; from deploy.cli import main; main()"],
        env={**os.environ, **variables, "_FEDHYPEVAE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_TEST": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    offered = complete(shell, "synth")
    assert "synthesize" in offered
    assert "Usage" not in offered  # that would be the help text, which names every command
    assert "verify" in complete(shell, "release ver")
    assert "is now" not in complete(shell, "site list fol")
