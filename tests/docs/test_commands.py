"""Every command that the documentation shows is one that the program has, with these options."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.coordinator.templates import checklist
from tests.docs.pages import PAGES, ROOT, commands

FOUND = [(page, one) for page in PAGES for one in commands(page)]


@pytest.mark.parametrize(("page", "line"), FOUND, ids=[f"{page.name}: {one}" for page, one in FOUND])
def test_shown_command_exists_with_its_options(page: Path, line: str) -> None:
    parse(line)


def test_checklist_shows_commands_that_exist_and_asks_both_sides_for_one_unit(tmp_path: Path) -> None:
    page = tmp_path / "CHECKLIST.md"
    page.write_text(checklist("study", ("st-anna",), "/srv/server", "/srv/site", "fl.example.org:9092"))
    found = commands(page)
    for line in found:
        parse(line)
    # without data there yet `site init` must be given a unit, and a policy refuses a run of another one
    assert any("site init" in line and "--unit patient" in line for line in found)
    assert any("fedhypevae run" in line and "unit=patient" in line for line in found)


def test_pages_show_commands() -> None:
    assert len(FOUND) > 40
    assert {page.name for page, _ in FOUND} >= {"README.md", "hospital.md", "coordinator.md", "receiver.md"}
    assert (ROOT / "docs" / "receiver.md", "fedhypevae release verify bundle --key FINGERPRINT") in FOUND


@pytest.mark.parametrize("line", ["fedhypevae site begin FOLDER", "fedhypevae report outputs/demo --colour red"])
def test_check_finds_what_is_not_there(line: str) -> None:
    with pytest.raises(AssertionError, match="No such"):
        parse(line)


def parse(line: str) -> None:
    """Have the program find the command and its options; it shows the command's help instead of running it."""
    words = [word for word in shlex.split(line)[1:] if word != "..."]
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0, done.output
