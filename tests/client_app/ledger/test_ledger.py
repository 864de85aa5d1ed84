"""The ledger's arithmetic and its life: declare, reserve, commit, refuse, close, move."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from client_app.ledger import upkeep
from client_app.ledger.ledger import Ledger
from client_app.ledger.limits import BudgetLimits
from common.errors import BudgetExceeded, LedgerError
from common.privacy.events import PrivacyEvent, gaussian, sampled_gaussian

LIMITS = BudgetLimits(lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=2.0)
DIGEST = hashlib.sha256(b"payload").hexdigest()
OTHER_DIGEST = hashlib.sha256(b"another payload").hexdigest()
ROUND = gaussian(20.0, label="round")
PLAN = (gaussian(20.0, count=10, label="round"),)


def gaussian_delta(noise_multiplier: float, count: int, epsilon: float) -> float:
    """Exact δ of `count` Gaussian releases (Balle and Wang 2018, theorem 8), by nothing of the project."""
    mu = math.sqrt(count) / noise_multiplier
    upper = 0.5 * math.erfc(-(mu / 2 - epsilon / mu) / math.sqrt(2))
    lower = 0.5 * math.erfc((mu / 2 + epsilon / mu) / math.sqrt(2))
    return upper - math.exp(epsilon) * lower


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "ledger.db", "cohort-1", tmp_path / "elsewhere" / "witness.json") as opened:
        yield opened


def release(ledger: Ledger, run_id: str, round_key: str, event: PrivacyEvent = ROUND) -> None:
    reservation = ledger.reserve(run_id, round_key, [event], limits=LIMITS, fingerprint="f")
    ledger.commit(reservation, hashlib.sha256(f"{run_id} {round_key}".encode()).hexdigest())


def charged_count(ledger: Ledger) -> int:
    return sum(event.count for run in ledger.runs.values() for event in run.charged)


def test_reserve_charges_before_anything_is_committed(ledger: Ledger) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    assert charged_count(ledger) == 0
    ledger.reserve("run", "round-1", [ROUND], limits=LIMITS, fingerprint="f")
    assert charged_count(ledger) == 1
    with Ledger.open(ledger.path, "cohort-1") as after_a_crash:
        assert charged_count(after_a_crash) == 1


def test_ledger_spent_agrees_with_the_exact_gaussian(ledger: Ledger) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    for number in range(4):
        release(ledger, "run", f"round-{number}")
    figures = upkeep.spent(ledger, 1e-5)
    (run,) = figures.runs
    assert (run.rounds_reserved, run.rounds_committed, run.closed) == (4, 4, False)
    assert figures.epsilon == run.epsilon
    assert gaussian_delta(20.0, 4, figures.epsilon) <= 1e-5
    assert gaussian_delta(20.0, 4, figures.epsilon - 0.01) > 1e-5
    assert gaussian_delta(20.0, 10, figures.epsilon_promised) <= 1e-5
    assert gaussian_delta(20.0, 10, figures.epsilon_promised - 0.01) > 1e-5


def test_ledger_outlives_runs_and_processes(ledger: Ledger) -> None:
    """A ledger that starts anew with each run (a broken version) would never refuse."""
    admitted, refusal = 0, ""
    while not refusal and admitted < 200:
        with Ledger.open(ledger.path, "cohort-1") as opened:
            try:
                opened.declare_run(f"run-{admitted}", PLAN, LIMITS, fingerprint="f")
            except BudgetExceeded as error:
                refusal = str(error)
                break
            for place in range(2):
                release(opened, f"run-{admitted}", f"round-{place}", gaussian(20.0, count=5))
            admitted += 1
    assert "is left" in refusal
    assert gaussian_delta(20.0, 10 * admitted, LIMITS.lifetime_epsilon) <= LIMITS.lifetime_delta
    # The filter gives away little: twice as many would break the budget.
    assert gaussian_delta(20.0, 20 * admitted, LIMITS.lifetime_epsilon) > LIMITS.lifetime_delta


def test_ledger_growing_data_keeps_what_was_spent(ledger: Ledger) -> None:
    """A ledger keyed by the data's fingerprint (a broken version) would forget it."""
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="before")
    ledger.reserve("run", "round-1", [ROUND], limits=LIMITS, fingerprint="before")
    ledger.declare_run("later", PLAN, LIMITS, fingerprint="one image more")
    ledger.reserve("later", "round-1", [ROUND], limits=LIMITS, fingerprint="one image more")
    assert charged_count(ledger) == 2
    recorded = [entry["body"].get("fingerprint") for entry in upkeep.export(ledger)["entries"]]
    assert recorded == [None, "before", "before", "one image more", "one image more"]


@pytest.mark.parametrize(
    "plan",
    [
        (gaussian(1.0),),
        (gaussian(0.0),),
        (sampled_gaussian(1.0, 0.5, count=1000),),
        (gaussian(20.0, count=10), gaussian(1.5, label="statistics")),
    ],
)
def test_declare_run_refusal_charges_nothing(ledger: Ledger, plan: tuple[PrivacyEvent, ...]) -> None:
    before = ledger.head
    with pytest.raises(BudgetExceeded):
        ledger.declare_run("greedy", plan, LIMITS, fingerprint="f")
    assert ledger.verify() == before
    assert ledger.runs == {}
    with pytest.raises(LedgerError, match="not declared"):
        ledger.reserve("greedy", "round-1", [plan[0]], limits=LIMITS, fingerprint="f")
    assert ledger.verify() == before


def test_reserve_never_passes_the_declared_plan(ledger: Ledger) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    for number in range(10):
        ledger.reserve("run", f"round-{number}", [ROUND], limits=LIMITS, fingerprint="f")
    before = ledger.head
    for event in (ROUND, gaussian(0.1), gaussian(1000.0), sampled_gaussian(20.0, 0.5)):
        with pytest.raises(BudgetExceeded, match="declared"):  # although the limits leave room for a round more
            ledger.reserve("run", "round-10", [event], limits=LIMITS, fingerprint="f")
    with pytest.raises(BudgetExceeded, match="other events"):
        ledger.reserve("run", "round-9", [gaussian(20.0, count=2)], limits=LIMITS, fingerprint="f")
    assert ledger.verify() == before
    assert charged_count(ledger) == 10


def test_reserve_of_other_noise_than_declared_is_refused(ledger: Ledger) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    with pytest.raises(BudgetExceeded):
        ledger.reserve("run", "round-1", [gaussian(1.0)], limits=LIMITS, fingerprint="f")
    assert charged_count(ledger) == 0


def test_reserve_of_a_committed_round_is_free_and_names_its_payload(ledger: Ledger) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    first = ledger.reserve("run", "round-1", [ROUND], limits=LIMITS, fingerprint="f")
    assert first.payload_digest is None
    ledger.commit(first, DIGEST)
    head = ledger.head
    again = ledger.reserve("run", "round-1", [ROUND], limits=LIMITS, fingerprint="f")
    assert again.payload_digest == DIGEST
    assert ledger.head == head
    assert charged_count(ledger) == 1
    assert ledger.commit(again, DIGEST) == head
    with pytest.raises(LedgerError, match="another payload"):
        ledger.commit(again, OTHER_DIGEST)


def test_reserve_after_a_crash_charges_anew_and_fences_the_orphan(ledger: Ledger) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    orphan = ledger.reserve("run", "round-1", [ROUND], limits=LIMITS, fingerprint="f")
    second = ledger.reserve("run", "round-1", [ROUND], limits=LIMITS, fingerprint="f")
    assert charged_count(ledger) == 2
    assert (orphan.attempt, second.attempt) == (1, 2)
    with pytest.raises(LedgerError, match="taken over"):
        ledger.commit(orphan, DIGEST)
    ledger.commit(second, OTHER_DIGEST)
    with pytest.raises(LedgerError, match="taken over"):
        ledger.commit(orphan, DIGEST)


def test_reserve_extends_the_plan_only_where_the_limits_leave_room(tmp_path: Path) -> None:
    for name, run_epsilon, fits in (("tight", 0.58, False), ("roomy", 0.8, True)):
        limits = BudgetLimits(3.0, 1e-5, run_epsilon)
        with Ledger.create(tmp_path / f"{name}.db", "cohort") as ledger:
            ledger.declare_run("run", PLAN, limits, fingerprint="f")
            ledger.reserve("run", "round-0", [ROUND], limits=limits, fingerprint="f")  # killed
            for number in range(9):
                ledger.reserve("run", f"round-{number}", [ROUND], limits=limits, fingerprint="f")
            if fits:
                ledger.reserve("run", "round-9", [ROUND], limits=limits, fingerprint="f")
                assert charged_count(ledger) == 11
            else:
                with pytest.raises(BudgetExceeded):
                    ledger.reserve("run", "round-9", [ROUND], limits=limits, fingerprint="f")
                assert charged_count(ledger) == 10


def test_declare_run_again_changes_nothing_but_another_plan_is_refused(ledger: Ledger) -> None:
    head = ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    assert ledger.declare_run("run", PLAN, LIMITS, fingerprint="f") == head
    with pytest.raises(LedgerError, match="other events"):
        ledger.declare_run("run", (gaussian(20.0, count=11),), LIMITS, fingerprint="f")
    assert ledger.verify() == head


def test_concurrent_runs_cannot_overspend_together(ledger: Ledger) -> None:
    """Each alone fits; an open run counts with all it declared, a closed one with what it was charged."""
    half = (gaussian(2.6),)
    limits = BudgetLimits(lifetime_epsilon=2.2, lifetime_delta=1e-5, run_epsilon=2.0)
    ledger.declare_run("first", half, limits, fingerprint="f")
    with pytest.raises(BudgetExceeded, match=r"Run first: .*open"):
        ledger.declare_run("second", half, limits, fingerprint="f")
    ledger.close_run("first", "stopped before it began")
    ledger.declare_run("second", half, limits, fingerprint="f")
    with pytest.raises(BudgetExceeded, match="closed"):
        ledger.reserve("first", "round-1", half, limits=limits, fingerprint="f")
    ledger.reserve("second", "round-1", half, limits=limits, fingerprint="f")
    ledger.close_run("second", "done")
    with pytest.raises(BudgetExceeded, match=r"Run second: .*closed"):
        ledger.declare_run("third", half, limits, fingerprint="f")


def test_declare_run_closes_idle_runs_only_if_that_helps(ledger: Ledger) -> None:
    half = (gaussian(2.6),)
    limits = BudgetLimits(lifetime_epsilon=2.2, lifetime_delta=1e-5, run_epsilon=2.0)
    ledger.declare_run("forgotten", half, limits, fingerprint="f")
    time.sleep(0.02)
    hour, moment = timedelta(hours=1), timedelta(milliseconds=5)
    with pytest.raises(BudgetExceeded):
        ledger.declare_run("next", half, limits, fingerprint="f", close_idle_after=hour)
    with pytest.raises(BudgetExceeded):
        ledger.declare_run("greedy", (gaussian(0.5),), limits, fingerprint="f", close_idle_after=moment)
    assert not ledger.runs["forgotten"].closed
    ledger.declare_run("next", half, limits, fingerprint="f", close_idle_after=moment)
    assert ledger.runs["forgotten"].closed
    ledger.verify()


def test_first_run_on_the_tighter_bound_counts_whole_for_ever(ledger: Ledger) -> None:
    """Its PLD ε fits the lifetime, its RDP ε does not: nothing may follow, even if it stops early."""
    limits = BudgetLimits(lifetime_epsilon=1.0, lifetime_delta=1e-4, run_epsilon=1.0)
    plan = (gaussian(3.186 * math.sqrt(4), count=4),)  # ε = 1 at δ = 1e-4 for the whole
    ledger.declare_run("only", plan, limits, fingerprint="f")
    assert ledger.runs["only"].counts_whole
    ledger.reserve("only", "round-1", [gaussian(3.186 * 2)], limits=limits, fingerprint="f")
    ledger.close_run("only", "stopped early")
    with pytest.raises(BudgetExceeded):
        ledger.declare_run("more", (gaussian(100.0),), limits, fingerprint="f")


def test_stricter_policy_applies_to_a_run_under_way(ledger: Ledger) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    release(ledger, "run", "round-1")
    stricter = BudgetLimits(lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=0.3)
    with pytest.raises(BudgetExceeded, match=r"0\.3 for one run"):
        ledger.reserve("run", "round-2", [ROUND], limits=stricter, fingerprint="f")
    assert charged_count(ledger) == 1


def test_ledger_never_mixes_records_and_patients(ledger: Ledger) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    per_patient = BudgetLimits(3.0, 1e-5, 2.0, unit="patient")
    with pytest.raises(BudgetExceeded, match="protects one record"):
        ledger.declare_run("other", PLAN, per_patient, fingerprint="f")


@pytest.mark.parametrize(
    "values",
    [
        (math.nan, 1e-5, 1.0),
        (math.inf, 1e-5, 1.0),
        (1.0, 0.0, 1.0),
        (1.0, 1.0, 1.0),
        (1.0, 1e-5, -1.0),
        (0.0, 1e-5, 1.0),
    ],
)
def test_budget_limits_refuse_what_would_limit_nothing(values: tuple[float, float, float]) -> None:
    with pytest.raises(LedgerError, match="budget limits"):
        BudgetLimits(*values)


def test_move_leaves_one_live_ledger(ledger: Ledger, tmp_path: Path) -> None:
    witness = tmp_path / "elsewhere" / "witness.json"
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    pending = ledger.reserve("run", "round-1", [ROUND], limits=LIMITS, fingerprint="f")
    upkeep.move(ledger, tmp_path / "new.db")
    for use in (
        lambda: ledger.commit(pending, DIGEST),
        lambda: ledger.reserve("run", "round-2", [ROUND], limits=LIMITS, fingerprint="f"),
        lambda: ledger.declare_run("next", PLAN, LIMITS, fingerprint="f"),
        lambda: ledger.close_run("run", "done"),
    ):
        with pytest.raises(LedgerError, match="moved"):
            use()
    with pytest.raises(LedgerError, match="moved"):
        Ledger.open(tmp_path / "ledger.db", "cohort-1", witness)
    with Ledger.open(tmp_path / "new.db", "cohort-1", witness) as moved:
        moved.commit(pending, DIGEST)
        assert charged_count(moved) == 1
    (tmp_path / "new.db").unlink()
    with (
        pytest.raises(LedgerError, match=r"moved|rolled back"),
        Ledger.open(tmp_path / "ledger.db", "cohort-1", witness, allow_moved=True) as old,
    ):
        upkeep.move(old, tmp_path / "new.db")


def test_moved_ledger_is_not_opened_where_no_witness_tells(tmp_path: Path) -> None:
    """Without a witness the last entry alone says that the ledger lives elsewhere now."""
    with Ledger.create(tmp_path / "old.db", "cohort-1") as ledger:
        ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
        upkeep.move(ledger, tmp_path / "new.db")
        with pytest.raises(LedgerError, match="moved"):
            ledger.declare_run("next", PLAN, LIMITS, fingerprint="f")
    with pytest.raises(LedgerError, match="moved"):
        Ledger.open(tmp_path / "old.db", "cohort-1")


def test_move_that_broke_off_is_completed(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(LedgerError, match="killed"):
            upkeep.move(ledger, tmp_path / "new.db")
    with pytest.raises(LedgerError, match="moved"):
        Ledger.open(ledger.path, "cohort-1")
    with Ledger.open(ledger.path, "cohort-1", tmp_path / "elsewhere" / "witness.json", allow_moved=True) as old:
        with pytest.raises(LedgerError, match="was moved to"):
            upkeep.move(old, tmp_path / "third.db")
        upkeep.move(old, tmp_path / "new.db")
    with Ledger.open(tmp_path / "new.db", "cohort-1", tmp_path / "elsewhere" / "witness.json") as moved:
        moved.reserve("run", "round-1", [ROUND], limits=LIMITS, fingerprint="f")


def test_backup_is_whole_and_refuses_to_replace(ledger: Ledger, tmp_path: Path) -> None:
    ledger.declare_run("run", PLAN, LIMITS, fingerprint="f")
    assert upkeep.backup(ledger, tmp_path / "backup.db") == ledger.head
    with Ledger.open(tmp_path / "backup.db", "cohort-1", read_only=True) as copy:
        assert upkeep.export(copy)["entries"] == upkeep.export(ledger)["entries"]
    with pytest.raises(LedgerError, match="exists already"):
        upkeep.backup(ledger, tmp_path / "backup.db")


def test_backup_works_on_a_disk_without_hard_links(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert upkeep.backup(ledger, tmp_path / "backup.db") == ledger.head
    before = (tmp_path / "backup.db").read_bytes()
    with pytest.raises(LedgerError, match="exists already"):
        upkeep.backup(ledger, tmp_path / "backup.db")
    assert (tmp_path / "backup.db").read_bytes() == before


def test_ledger_round_needs_no_heavy_import_and_little_time(ledger: Ledger) -> None:
    """A fresh process starts for every message: 50 rounds must not compose losses 50 times."""
    ledger.declare_run("run", (gaussian(200.0, count=1000),), LIMITS, fingerprint="f")
    for number in range(100):
        release(ledger, "run", f"round-{number}", gaussian(200.0))
    code = """
import sys, time
from pathlib import Path
from client_app.ledger.ledger import BudgetLimits, Ledger
from common.privacy.events import gaussian
start = time.process_time()
limits = BudgetLimits(lifetime_epsilon=3.0, lifetime_delta=1e-5, run_epsilon=2.0)
with Ledger.open(Path(sys.argv[1]), "cohort-1") as ledger:
    ledger.declare_run("run", (gaussian(200.0, count=1000),), limits, fingerprint="f")
    reservation = ledger.reserve("run", "round-new", [gaussian(200.0)], limits=limits, fingerprint="f")
    ledger.commit(reservation, "0" * 64)
seconds = time.process_time() - start
heavy = {"torch", "flwr", "dp_accounting", "opacus", "scipy", "numpy"} & set(sys.modules)
print(seconds, sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code, str(ledger.path)], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]"
    assert float(seconds) < 2.0
