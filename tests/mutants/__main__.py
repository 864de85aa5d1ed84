"""`make mutants`: plant each privacy bug of the list by itself, run the tests of its part, and say which test fails.

    python -m tests.mutants [--only NAME ...] [--left] [--jobs 2] [--write-table] [--check]

The working tree is copied to a temporary folder and stays as it is. A test that finds a bug must pass without it.
Outcomes are kept in `outputs/mutants.json`; the table of the last whole run stands in `tests/statistical/README.md`.
Ends with "uncaught: none" (exit code 0), or with the bugs that no test found or that can't be planted (1).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Lock

from tests.mutants.forked import make_context, run_pytest
from tests.mutants.planting import Mutant, Sources, StaleError, Tests, load_mutants

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "outputs" / "mutants.json"
TABLE = ROOT / "tests" / "statistical" / "README.md"
_START, _END = "<!-- mutants: written by `python -m tests.mutants --write-table` -->", "<!-- end of mutants -->"
_NOT_COPIED = (".*", "__pycache__", "outputs", "build", "dist", "*.egg-info", "downloads")
_FAILED = re.compile(r"^(?:FAILED|ERROR) ([^\s:]+::(.+?))( - .*)?$", re.MULTILINE)
# An error of this kind says that the bug was planted badly, not that a test found it.
_BROKEN = re.compile(r"^E +(NameError|UnboundLocalError|ImportError|ModuleNotFoundError|SyntaxError)\b", re.MULTILINE)
_LIMIT_S = 240


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: `caught`, `NOT CAUGHT`, or why it could not be tried; and the test that failed."""

    name: str
    part: str
    function: str
    breaks: str
    status: str
    by: str = ""
    seconds: float = 0.0


class Tree:
    """A copy of the working tree in which one bug at a time is planted."""

    def __init__(self, folder: Path, context: ForkServerContext, root: Path = ROOT) -> None:
        self.folder, self._context = folder, context
        self._written = int(time.time())
        for item in root.iterdir():
            ignored = shutil.ignore_patterns(*_NOT_COPIED)
            if item.name in ignored(str(root), [item.name]):
                continue
            if item.is_dir():
                shutil.copytree(item, folder / item.name, ignore=ignored)
            else:
                shutil.copy2(item, folder / item.name)

    def write(self, path: Path, text: str) -> None:
        """Replace a file, each time with a later date, so that no compiled form of before is taken for it."""
        (self.folder / path).write_text(text, encoding="utf-8")
        self._written += 2
        os.utime(self.folder / path, (self._written, self._written))

    def pytest(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Exit code and output of a run of these tests here."""
        words = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", f"--timeout={_LIMIT_S}", *arguments]
        output = self.folder / ".output"
        code = run_pytest(self._context, self.folder, words, output)
        return code, output.read_text(encoding="utf-8", errors="replace")


class Control:
    """Whether tests pass without any bug: only then does their failing say anything. Each is asked once."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def passes(self, tree: Tree, test: str) -> bool:
        """Run one test, by pytest's name of it, in a tree without a bug."""
        if test not in self._known:
            self._known[test] = tree.pytest([test])[0] == 0
        return self._known[test]


def try_mutant(tree: Tree, sources: Sources, tests: Tests, mutant: Mutant, control: Control) -> Outcome:
    """Plant one bug, run its tests, and take it out again; the test that failed must pass then.

    Args:
        tree: where.
        sources: of the unchanged tree.
        tests: of the tree.
        mutant: the bug.
        control: runs tests without a bug.
    """

    def outcome(status: str, by: str = "", since: float | None = None) -> Outcome:
        seconds = 0.0 if since is None else round(time.monotonic() - since, 1)
        return Outcome(mutant.name, mutant.part, mutant.function, mutant.breaks, status, by, seconds)

    try:
        path, text = sources.plant(mutant)
        arguments = tests.arguments(mutant.tests)
    except StaleError as error:
        return outcome(f"STALE: {error}")
    before, start = (tree.folder / path).read_text(encoding="utf-8"), time.monotonic()
    tree.write(path, text)
    try:
        code, output = tree.pytest(["-x", *arguments])
    finally:
        tree.write(path, before)
    if code == 0:
        return outcome("NOT CAUGHT", since=start)
    failed = _FAILED.search(output)
    broken = _BROKEN.search(output)
    if code != 1 or failed is None or broken is not None:
        why = broken[1] if broken is not None else " ".join(output.split())[-200:]
        return outcome(f"BROKEN: {why}", since=start)
    if "Timeout" in (failed[3] or ""):
        return outcome("TIMED OUT", failed[2], start)
    if not control.passes(tree, failed[1]):
        return outcome("NOT CAUGHT: its test fails without it", failed[2], start)
    return outcome("caught", failed[2], start)


def table(outcomes: Sequence[Outcome]) -> str:
    """The list as Markdown."""
    lines = [_START, "", "| part | bug | where | caught by |", "|---|---|---|---|"]
    for found in outcomes:
        by = f"`{found.by.partition('[')[0]}`" if found.status == "caught" else f"**{found.status}**"
        lines.append(f"| {found.part} | {found.breaks} | `{found.function}` | {by} |")
    count = sum(found.status == "caught" for found in outcomes)
    lines += ["", f"{count} of {len(outcomes)} are caught.", "", _END]
    return "\n".join(lines)


def write_table(outcomes: Sequence[Outcome]) -> None:
    """Put the list where it stands between the tests' other promises."""
    text = TABLE.read_text(encoding="utf-8")
    start, end = text.find(_START), text.find(_END)
    if start < 0 or end < 0:
        raise SystemExit(f"{TABLE} has no place for the table: expected the lines {_START!r} and {_END!r}")
    TABLE.write_text(text[:start] + table(outcomes) + text[end + len(_END) :], encoding="utf-8")


def read_results() -> list[Outcome]:
    """Outcomes of earlier runs."""
    if not RESULTS.is_file():
        return []
    return [Outcome(**values) for values in json.loads(RESULTS.read_text(encoding="utf-8"))]


def write_results(fresh: Iterable[Outcome]) -> list[Outcome]:
    """Write these outcomes beside those of earlier runs; mutants that are not in the list any more are left out."""
    known = {found.name: found for found in (*read_results(), *fresh)}
    kept = [known[mutant.name] for mutant in load_mutants(HERE) if mutant.name in known]
    content = json.dumps([asdict(found) for found in kept], indent=1, ensure_ascii=False) + "\n"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(content, encoding="utf-8")
    return kept


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="mutants, or parts, by name")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default: 1)")
    parser.add_argument("--write-table", action="store_true", help=f"write the table into {TABLE.name}")
    parser.add_argument("--left", action="store_true", help="those alone that no run has caught yet")
    parser.add_argument("--check", action="store_true", help="only say which can't be planted; run no test")
    options = parser.parse_args()
    every = load_mutants(HERE)
    mutants = [m for m in every if not options.only or m.name in options.only or m.part in options.only]
    if options.left:
        done = {found.name for found in read_results() if found.status == "caught"}
        mutants = [mutant for mutant in mutants if mutant.name not in done]
    missing = set(options.only) - {m.name for m in every} - {m.part for m in every}
    if missing:
        parser.error(f"there is no mutant or part {', '.join(sorted(missing))}")
    sources, tests = Sources(ROOT), Tests(ROOT)
    if options.check:
        stale = 0
        for mutant in mutants:
            try:
                sources.plant(mutant)
                tests.arguments(mutant.tests)
            except StaleError as error:
                stale += 1
                print(f"{mutant.name}: STALE: {error}")
        print(f"{len(mutants)} mutants, {stale} stale")
        return int(stale > 0)
    os.environ |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    context = make_context()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for number in range(options.jobs):
            home = Path(folder) / str(number)
            home.mkdir()
            trees.put(Tree(home, context))
        control = Control()
        writing = Lock()

        def one(mutant: Mutant) -> Outcome:
            tree = trees.get()
            try:
                found = try_mutant(tree, sources, tests, mutant, control)
            finally:
                trees.put(tree)
            with writing:
                write_results([found])
            print(f"{found.status:<12} {found.name:<44} {found.by} ({found.seconds:.0f} s)", flush=True)
            return found

        with ThreadPoolExecutor(options.jobs) as pool:
            outcomes = list(pool.map(one, mutants))
    if options.write_table:
        write_table(write_results(outcomes))
    uncaught = [found.name for found in outcomes if found.status != "caught"]
    print(f"{len(outcomes)} mutants, {len(outcomes) - len(uncaught)} caught")
    print(f"uncaught: {', '.join(uncaught) if uncaught else 'none'}")
    return int(bool(uncaught))


if __name__ == "__main__":
    raise SystemExit(main())
