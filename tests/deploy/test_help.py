"""Every command explains itself with an example, and shells can complete it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from deploy.cli import app


def commands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command below one, groups left out."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, (*words, name))
    else:
        yield words


EVERY = list(commands(typer.main.get_command(app)))


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
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    offered = complete(shell, "synth")
    assert "synthesize" in offered
    assert "Usage" not in offered  # that would be the help text, which names every command
    assert "verify" in complete(shell, "release ver")
