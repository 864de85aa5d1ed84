"""docs/paper.md tells the truth: every function of its table exists and bears its equation, every test exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| (\d+) \| [^|]+ \| `(\w+)` \| `(\w+)` \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "paper.md").read_text(encoding="utf-8"))


@cache
def functions(folder: str) -> dict[str, list[str]]:
    """Source of every function below a folder, by name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]  # with the comment behind the last
                found.setdefault(node.name, []).append("\n".join(lines))
    return found


def test_every_equation_has_a_row() -> None:
    assert {int(number) for number, _, _ in ROWS} == set(range(1, 14))


@pytest.mark.parametrize(("number", "function", "test"), ROWS)
def test_equation_stands_where_the_table_says(number: str, function: str, test: str) -> None:
    assert any(f"# Eq. ({number})" in source for source in functions("common").get(function, [])), function
    assert test in functions("tests"), test
