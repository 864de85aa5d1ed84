"""Privacy bugs as a list, and where each stands: by a function's name and its text, never by path or line.

A mutant names a function (`draw_units`, `Ledger.open`, a class, or a name that a module assigns), a piece of its source
and what stands in its place. Runs of white space match each other, so that a new format changes nothing. The function
is looked for in the whole tree; it and the text must be found exactly once. Tests are named by function or by the stem
of their module, and are looked for likewise.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# Folders without code that protects anybody; everything else under the root is looked through.
_ELSEWHERE = frozenset({"tests", "benchmarks", "docs", "build", "dist", "outputs"})


class StaleError(Exception):
    """A mutant's function, text or test is not there, or is there more than once."""


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        name: short and unique.
        part: what of the protection it is about: the name of its file.
        function: qualified name of where it is planted.
        old, new: source text, and what takes its place.
        tests: test functions or stems of test modules, the narrowest that should fail.
        breaks: what it would do to somebody, in a line.
    """

    name: str
    part: str
    function: str
    old: str
    new: str
    tests: tuple[str, ...]
    breaks: str


def load_mutants(folder: Path) -> list[Mutant]:
    """All mutants of the folder's TOML files. Raises StaleError for a double name or a missing field."""
    found: dict[str, Mutant] = {}
    for path in sorted(folder.glob("*.toml")):
        for values in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            mutant = _mutant(path.stem, values)
            if mutant.name in found:
                raise StaleError(f"two mutants are named {mutant.name}")
            found[mutant.name] = mutant
    return list(found.values())


def _mutant(part: str, values: Mapping[str, Any]) -> Mutant:
    try:
        return Mutant(part=part, **{**values, "tests": tuple(values["tests"])})
    except (TypeError, KeyError) as error:
        raise StaleError(f"{part}.toml: a mutant has other fields than expected ({error})") from None


@dataclass(frozen=True)
class Place:
    """A file and the stretch of its text that a name stands for."""

    path: Path
    start: int
    stop: int


class Sources:
    """Every function, class and assigned name of a tree, by qualified name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._texts: dict[Path, str] = {}
        self._places: dict[str, list[Place]] = {}
        for path in _modules(root):
            text = self._texts[path] = path.read_text(encoding="utf-8")
            lines = [0]
            for line in text.splitlines(keepends=True):
                lines.append(lines[-1] + len(line))
            for name, first, last in _named(ast.parse(text).body, ""):
                self._places.setdefault(name, []).append(Place(path, lines[first - 1], lines[last]))

    def plant(self, mutant: Mutant) -> tuple[Path, str]:
        """The file that the mutant changes, relative to the root, and its whole changed text.

        Raises:
            StaleError: the function or the text is not there, or more than once; or what comes out is no Python.
        """
        places = self._places.get(mutant.function, [])
        if not places:
            raise StaleError(f"there is no {mutant.function}")
        pattern = re.compile(r"\s+".join(re.escape(word) for word in mutant.old.split()))
        found = [
            (place.path, match)
            for place in places
            for match in pattern.finditer(self._texts[place.path], place.start, place.stop)
        ]
        if len(found) != 1:
            raise StaleError(f"{mutant.function} holds the text {len(found)} times, expected once")
        (path, match), text = found[0], self._texts[found[0][0]]
        before = text[: match.start()]
        line = before[before.rfind("\n") + 1 :]
        indent = line[: len(line) - len(line.lstrip())]
        new = textwrap.dedent(mutant.new).strip("\n").replace("\n", f"\n{indent}")
        changed = before + new + text[match.end() :]
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise StaleError(f"{mutant.function} is no Python any more ({error})") from None
        if changed == text:
            raise StaleError(f"{mutant.function} is not changed at all")
        return path.relative_to(self.root), changed


class Tests:
    """Every test function and test module of a tree, by name."""

    __test__ = False  # not a test class, whatever its name suggests to a collector

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def _known(self) -> dict[str, list[str]]:
        known: dict[str, list[str]] = {}
        for path in sorted(self.root.glob("tests/**/test_*.py")):
            where = path.relative_to(self.root).as_posix()
            known.setdefault(path.stem, []).append(where)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    known.setdefault(node.name, []).append(f"{where}::{node.name}")
        return known

    def arguments(self, names: Iterable[str]) -> list[str]:
        """What pytest is called with for these names. Raises StaleError."""
        found = []
        for name in names:
            if name not in self._known:
                raise StaleError(f"there is no test {name}")
            found += self._known[name]
        return found


def _modules(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) > 1 and parts[0] not in _ELSEWHERE and not any(part.startswith(".") for part in parts):
            yield path


def _named(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, int, int]]:
    """Qualified names with their first and last line."""
    for node in body:
        last = node.end_lineno or node.lineno
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield f"{prefix}{node.name}", first, last
            yield from _named(node.body, f"{prefix}{node.name}.")
        elif not prefix and isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        yield name.id, node.lineno, last
