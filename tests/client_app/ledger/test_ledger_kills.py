"""Two writers, killed at random instants: releases <= ledger <= budget, every time.

The writers do what a site does for each round: reserve, keep the payload, commit, log, send. "Sending" is one
line appended to a file that stands for the server. The checker knows nothing of the ledger's code: it adds up
what was sent with the exact formula of the Gaussian mechanism. Broken writers show that the check can fail.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client_app.ledger.ledger import Ledger
from client_app.ledger.limits import BudgetLimits
from client_app.ledger.store import EntryStore
from client_app.release.log import ReleaseLog
from client_app.state.private_state import PrivateState
from common.errors import BudgetExceeded
from common.privacy.composition import epsilon_pld
from common.privacy.events import PrivacyEvent, gaussian

NOISE_MULTIPLIER = 50.0
ROUND = gaussian(NOISE_MULTIPLIER)
RUN_ROUNDS = 12
PLAN = (gaussian(NOISE_MULTIPLIER, count=RUN_ROUNDS),)
LIMITS = BudgetLimits(lifetime_epsilon=2.5, lifetime_delta=1e-5, run_epsilon=0.5)
KILLS = 200

Writer = Callable[[Path, str], None]


@pytest.fixture
def site() -> Iterator[Path]:
    """A folder in memory where there is one: a kill, unlike a power cut, does not test the disk."""
    in_memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=in_memory if os.access(in_memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def send(site: Path, run_id: str, round_key: str, digest: str) -> None:
    descriptor = os.open(site / "server.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{run_id} {round_key} {digest}\n".encode())
    os.close(descriptor)


def open_ledger(site: Path, name: str = "ledger.db") -> Ledger:
    return Ledger.open(site / name, "cohort", site / f"{name}.witness", create=True)


def unfinished_run(ledger: Ledger, writer: str) -> str:
    """The writer's run that goes on, or the next one."""
    mine = [run for run in ledger.runs.values() if run.run_id.startswith(writer)]
    if mine and not mine[-1].closed:
        return mine[-1].run_id
    return f"{writer}{len(mine)}"


def correct(site: Path, writer: str) -> None:
    """One process of a site, from the start of a run to its end; it can be killed anywhere."""
    with open_ledger(site) as ledger:
        run_id = unfinished_run(ledger, writer)
        private = PrivateState(site / "private", run_id)
        with private.locked():
            ledger.declare_run(run_id, PLAN, LIMITS, fingerprint="f")
            for number in range(RUN_ROUNDS):
                key = f"round-{number}"
                try:
                    reservation = ledger.reserve(run_id, key, [ROUND], limits=LIMITS, fingerprint="f")
                except BudgetExceeded:  # earlier kills used the plan up
                    break
                if reservation.payload_digest is None:
                    digest = private.save_payload(key, os.urandom(64))
                    ledger.commit(reservation, digest)
                else:
                    digest = reservation.payload_digest
                payload = private.load_payload(key, digest)
                ReleaseLog(site / "releases.jsonl").append(run_id, key, [ROUND.to_json()], digest, len(payload))
                send(site, run_id, key, digest)
            ledger.close_run(run_id, "done")


def charges_after_sending(site: Path, writer: str) -> None:
    """Broken: the release leaves first and is charged then."""
    with open_ledger(site) as ledger:
        run_id = unfinished_run(ledger, writer)
        ledger.declare_run(run_id, PLAN, LIMITS, fingerprint="f")
        for number in range(len(ledger.runs[run_id].rounds), RUN_ROUNDS):
            digest = hashlib.sha256(os.urandom(64)).hexdigest()
            send(site, run_id, f"round-{number}", digest)
            reservation = ledger.reserve(run_id, f"round-{number}", [ROUND], limits=LIMITS, fingerprint="f")
            ledger.commit(reservation, digest)
        ledger.close_run(run_id, "done")


def computes_again_after_a_crash(site: Path, writer: str) -> None:
    """Broken: a committed round that comes again is computed, and released, a second time for nothing."""
    with open_ledger(site) as ledger:
        run_id = unfinished_run(ledger, writer)
        ledger.declare_run(run_id, PLAN, LIMITS, fingerprint="f")
        for number in range(RUN_ROUNDS):
            reservation = ledger.reserve(run_id, f"round-{number}", [ROUND], limits=LIMITS, fingerprint="f")
            digest = hashlib.sha256(os.urandom(64)).hexdigest()
            if reservation.payload_digest is None:
                ledger.commit(reservation, digest)
            send(site, run_id, f"round-{number}", digest)
        ledger.close_run(run_id, "done")


def resets_with_each_run(site: Path, writer: str) -> None:
    """Broken: every run starts with a ledger of its own, so nothing is ever refused."""
    number = len(list(site.glob(f"{writer}*.db")))
    run_id = f"{writer}{number}"
    with open_ledger(site, f"{run_id}.db") as ledger:
        ledger.declare_run(run_id, PLAN, LIMITS, fingerprint="f")
        for place in range(RUN_ROUNDS):
            reservation = ledger.reserve(run_id, f"round-{place}", [ROUND], limits=LIMITS, fingerprint="f")
            digest = hashlib.sha256(os.urandom(64)).hexdigest()
            ledger.commit(reservation, digest)
            send(site, run_id, f"round-{place}", digest)


def exhaust(site: Path, writer: str) -> None:
    for _ in range(200):
        correct(site, writer)


def gaussian_delta(count: int, epsilon: float) -> float:
    """Exact δ of `count` Gaussian releases (Balle and Wang 2018, theorem 8)."""
    if count == 0:
        return 0.0
    mu = math.sqrt(count) / NOISE_MULTIPLIER
    upper = 0.5 * math.erfc(-(mu / 2 - epsilon / mu) / math.sqrt(2))
    return upper - math.exp(epsilon) * 0.5 * math.erfc((mu / 2 + epsilon / mu) / math.sqrt(2))


def problems(site: Path) -> list[str]:
    """What is wrong between the server's file, the ledgers and the budget; empty if all is well."""
    sent = {tuple(line.split()) for line in _lines(site / "server.txt")}
    committed: set[tuple[str, ...]] = set()
    charged = 0
    for path in site.glob("*.db"):
        connection = sqlite3.connect(path)
        for kind, run_id, round_key, count, digest in connection.execute(
            "SELECT kind, run_id, round_key, json_array_length(body, '$.events'), "
            "json_extract(body, '$.payload_digest') FROM entries"
        ):
            charged += count if kind == "reserve" else 0
            if kind == "commit":
                committed.add((run_id, round_key, digest))
        connection.close()
    found = []
    if not sent <= committed:
        found.append(f"{len(sent - committed)} releases that the ledger does not know")
    if len(committed) > charged:
        found.append(f"{len(committed)} commits of {charged} charges")
    if gaussian_delta(max(charged, len(sent)), LIMITS.lifetime_epsilon) > LIMITS.lifetime_delta:
        found.append(f"{charged} charges, {len(sent)} releases: more than the budget")
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def start(writer: Writer, site: Path, name: str) -> int:
    """Fork a writer; returns when it is about to begin."""
    reader, ready = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # a collection would copy the parent's memory
        code = 1
        try:
            os.write(ready, b".")
            writer(site, name)
            code = 0
        except BudgetExceeded:
            code = 0
        finally:
            os._exit(code)
    os.close(ready)
    os.read(reader, 1)
    os.close(reader)
    return child


def kill_two_writers(writer: Writer, site: Path, kills: int, seed: int) -> tuple[list[str], int, int]:
    """Start two writers, kill both at random instants, check, and again; stops at the first problem.

    Returns the problems, how many writers were killed, and how many ended with an error of their own.
    """
    picked = random.Random(seed)
    epsilon_pld(PLAN, LIMITS.lifetime_delta)  # composed once, here: the children inherit it
    longest_s = 0.02
    killed = failed = 0
    for _ in range(kills // 2):
        before = len(set(_lines(site / "server.txt")))
        children = [start(writer, site, name) for name in ("a", "b")]
        for child in children:
            time.sleep(picked.uniform(0.0, longest_s))
            os.kill(child, signal.SIGKILL)
        for child in children:
            status = os.waitpid(child, 0)[1]
            killed += 1  # signalled at some instant, now and then after its end
            failed += os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
        found = problems(site)
        if found:
            return found, killed, failed
        # As long as the machine of the day needs for a round or a few: no kill before the work, none after
        # it.
        progressed = len(set(_lines(site / "server.txt"))) - before >= 2
        longest_s = max(0.01, longest_s * 0.87) if progressed else min(0.5, longest_s * 1.15)
    return [], killed, failed


@pytest.mark.slow
def test_ledger_two_writers_killed_200_times_never_overspend(site: Path) -> None:
    found, killed, failed = kill_two_writers(correct, site, KILLS, seed=11)
    assert found == []
    assert killed >= KILLS
    assert failed <= 2  # a stalled machine can outlast a lock's time-out; nothing leaves then either
    sent = {tuple(line.split()) for line in _lines(site / "server.txt")}
    assert len(sent) >= 5  # they did get to work
    with open_ledger(site) as ledger:
        ledger.verify()
        committed = {
            known.payload_digest
            for run in ledger.runs.values()
            for known in run.rounds.values()
            if known.payload_digest
        }
        assert any(known.attempts > 1 for run in ledger.runs.values() for known in run.rounds.values())
        assert ReleaseLog(site / "releases.jsonl").verify(frozenset(committed)) >= len(sent)
    for writer in ("a", "b"):  # left alone, they go on until the budget is gone, and not beyond
        with pytest.raises(BudgetExceeded):
            exhaust(site, writer)
    assert problems(site) == []
    sent = {tuple(line.split()) for line in _lines(site / "server.txt")}
    assert gaussian_delta(2 * len(sent), LIMITS.lifetime_epsilon) > LIMITS.lifetime_delta


def test_ledger_three_writers_at_once_all_get_through(site: Path) -> None:
    """They wait for each other: nobody fails, and every reservation is in the chain."""
    with open_ledger(site) as ledger:
        ledger.declare_run("run", (gaussian(500.0, count=120),), LIMITS, fingerprint="f")

    def reserve_forty(folder: Path, name: str) -> None:
        for number in range(40):
            with open_ledger(folder) as mine:
                mine.reserve("run", f"{name}-{number}", [gaussian(500.0)], limits=LIMITS, fingerprint="f")

    children = [start(reserve_forty, site, name) for name in ("a", "b", "c")]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    with open_ledger(site) as ledger:
        assert ledger.verify().seq == 2 + 120
        assert len(ledger.runs["run"].charged) == 120


@pytest.mark.parametrize("writer", [charges_after_sending, computes_again_after_a_crash])
def test_ledger_broken_writers_are_caught_by_the_kills(site: Path, writer: Writer) -> None:
    found, _, _ = kill_two_writers(writer, site, KILLS, seed=12)
    assert found != []


def test_ledger_reset_with_each_run_is_caught_by_the_budget(site: Path) -> None:
    for _ in range(90):
        resets_with_each_run(site, "a")
    assert any("more than the budget" in problem for problem in problems(site))


def test_gaussian_delta_of_the_budget_is_what_the_accountant_says() -> None:
    events: list[PrivacyEvent] = [gaussian(NOISE_MULTIPLIER, count=300)]
    epsilon = epsilon_pld(events, 1e-5)
    assert gaussian_delta(300, epsilon) <= 1e-5 < gaussian_delta(300, epsilon - 0.01)


def test_ledger_killed_between_its_second_entry_and_the_witness_goes_on(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The witness of the first entry is written before there is a second one."""

    def dies(folder: Path, name: str) -> None:
        noted = EntryStore.note_head

        def note(self: EntryStore, **words: bool) -> None:
            if len(self.entries) > 1:
                os._exit(7)
            noted(self, **words)

        monkeypatch.setattr(EntryStore, "note_head", note)  # in this child alone
        with open_ledger(folder) as ledger:
            ledger.declare_run(name, (gaussian(500.0, count=2),), LIMITS, fingerprint="f")

    assert os.WEXITSTATUS(os.waitpid(start(dies, site, "run"), 0)[1]) == 7
    with open_ledger(site) as ledger:
        assert ledger.verify().seq == 2
        ledger.reserve("run", "round-1", [gaussian(500.0)], limits=LIMITS, fingerprint="f")
