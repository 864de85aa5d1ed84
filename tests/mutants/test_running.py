"""The runner says of a bug what is true of it, and leaves the working tree as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.__main__ import Control, Outcome, Tree, table, try_mutant
from tests.mutants.forked import make_context
from tests.mutants.planting import Mutant, Sources, Tests

SOURCE = """def double(value: int) -> int:
    return 2 * value


def half(value: int) -> float:
    return value / 2
"""
TESTS = """
from package.sums import double, half


def test_double() -> None:
    assert double(2) == 4


def test_nothing() -> None:
    assert half(4) == half(4)


def test_that_always_fails() -> None:
    assert half(4) == 3
"""
CASES = {
    "found": (Mutant("a", "p", "double", "2 * value", "3 * value", ("test_double",), ""), "caught", "test_double"),
    "not found": (Mutant("a", "p", "half", "value / 2", "value", ("test_nothing",), ""), "NOT CAUGHT", ""),
    "badly planted": (Mutant("a", "p", "double", "2 * value", "2 * other", ("test_double",), ""), "BROKEN", ""),
    "gone": (Mutant("a", "p", "treble", "3 * value", "value", ("test_double",), ""), "STALE", ""),
    "of a test that fails anyway": (
        Mutant("a", "p", "half", "value / 2", "value", ("test_that_always_fails",), ""),
        "NOT CAUGHT: its test fails without it",
        "test_that_always_fails",
    ),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Path]:
    root = tmp_path_factory.mktemp("root")
    for name, text in (("package/sums.py", SOURCE), ("tests/test_sums.py", TESTS)):
        (root / name).parent.mkdir()
        (root / name).write_text(text)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n')
    return Tree(tmp_path_factory.mktemp("copy"), make_context(()), root), root


@pytest.mark.parametrize("case", CASES)
def test_runner_says_what_became_of_a_bug(tree: tuple[Tree, Path], case: str) -> None:
    (copy, root), (mutant, status, by) = tree, CASES[case]
    tests = Tests(root)
    found = try_mutant(copy, Sources(root), tests, mutant, Control())
    assert found.status.startswith(status)
    assert found.by == by
    for folder in (root, copy.folder):
        assert (folder / "package" / "sums.py").read_text() == SOURCE


def test_table_shows_what_is_not_caught() -> None:
    lines = table([Outcome("a", "p", "f", "x", "caught", "test_a[1]"), Outcome("b", "p", "g", "y", "NOT CAUGHT")])
    assert "| p | x | `f` | `test_a` |" in lines
    assert "| p | y | `g` | **NOT CAUGHT** |" in lines
    assert "1 of 2 are caught." in lines
