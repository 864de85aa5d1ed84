"""docs/paper.md tells the truth: its functions stand in their files and bear their equations, its tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
EQUATIONS = re.findall(r"^\| (\d+) \| [^|]+ \| `([\w/]+\.py)` \| `(\w+)` \| `(\w+)` \|$", PAGE, re.MULTILINE)
STEPS = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)` \| `(\w+)` \|$", PAGE, re.MULTILINE)


@cache
def functions(path: Path) -> dict[str, str]:
    """Source of every function of a file, by name."""
    source = path.read_text(encoding="utf-8")
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
    return found


@cache
def all_tests() -> set[str]:
    """Names of the functions below tests/."""
    return {name for path in (ROOT / "tests").rglob("*.py") for name in functions(path)}


def test_every_row_is_read_and_every_equation_has_one() -> None:
    assert {int(number) for number, *_ in EQUATIONS} == set(range(1, 14))
    rows = PAGE.split("## Equations")[1].count("\n| ")
    assert len(EQUATIONS) + len(STEPS) == rows - 2  # but for the heads of the two tables
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "common").rglob("*.py"))
    marked = re.findall(r"# Eq\. \((\d+)\)", code)
    assert set(marked) == {number for number, *_ in EQUATIONS}


@pytest.mark.parametrize(("number", "file", "function", "test"), EQUATIONS)
def test_equation_stands_where_the_table_says(number: str, file: str, function: str, test: str) -> None:
    assert f"# Eq. ({number})" in functions(ROOT / "common" / file)[function]
    assert test in all_tests()


@pytest.mark.parametrize(("file", "function"), STEPS)
def test_step_stands_where_the_table_says(file: str, function: str) -> None:
    assert function in functions(ROOT / file)
