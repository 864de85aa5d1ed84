"""What fuzzers share: counts from one seed, a loop that no input may break, a command line."""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_SECONDS = 60  # that one folder may take; a file takes milliseconds
MOST_GROWTH_MB = 400


class Failure(AssertionError):
    """A property that did not hold; the text has all that is needed to see it again."""


@dataclass
class Session:
    """Counts of one session, all of it from one seed."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    read: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.numbers = np.random.default_rng(self.seed)

    @property
    def inputs(self) -> int:
        """How many changed inputs were read."""
        return sum(self.counts.values())

    def check(self, holds: bool, what: str) -> None:
        """Raise what is needed to see it again, where a property does not hold."""
        if not holds:
            raise Failure(f"seed {self.seed}, after {self.inputs} inputs: {what}")

    def line(self, message: str, name: str) -> None:
        """Check a refusal: one line that names what was refused."""
        self.refused += 1
        self.check(name in message and "\n" not in message and len(message) < 1000, f"a poor refusal: {message!r:.300}")


def feed(inputs: int, seed: int, one: Callable[[Session, Path], None], *, tell: bool = False) -> Session:
    """Call `one` with a new folder until so many inputs were read.

    Raises:
        Failure: a property did not hold, or memory grew; its text has the seed. A hang ends the process.
    """
    session, start, shown, before = Session(seed), time.monotonic(), 0, 0.0
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while session.inputs < inputs:
            folder = Path(home) / "x"
            folder.mkdir()
            faulthandler.dump_traceback_later(_SECONDS, exit=True)
            try:
                one(session, folder)
            except (Failure, KeyboardInterrupt):
                raise
            except BaseException as error:
                what = f"seed {seed}, after {session.inputs} inputs: {type(error).__name__}: {error}"
                raise Failure(what) from error
            finally:
                faulthandler.cancel_dump_traceback_later()
                shutil.rmtree(folder, ignore_errors=True)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            before = before or used
            session.check(used - before < MOST_GROWTH_MB, f"memory grew by {used - before:.0f} MB")
            if tell and session.inputs - shown >= 500:
                shown = session.inputs
                print(f"{shown} inputs, {shown / (time.monotonic() - start):.0f} a second", flush=True)
    return session


def command_line(about: str, fuzz: Callable[..., Session]) -> None:
    """Run a fuzzer: its counts by kind, and the seed of what failed."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    try:
        session = fuzz(chosen.inputs, chosen.seed, tell=True)
    except Failure as failure:
        traceback.print_exception(failure)
        sys.exit(1)
    print(f"{session.inputs} changed inputs: {session.refused} refusals, {session.read} read")
    for kind, count in sorted(session.counts.items()):
        print(f"  {kind:<24} {count}")
