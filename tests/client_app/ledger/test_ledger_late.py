"""What a ledger must withhold from whoever gets its receipts, and refuse to whoever has seen a release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client_app.ledger import upkeep
from client_app.ledger.chain import chained, make_entry
from client_app.ledger.ledger import Ledger
from client_app.ledger.limits import BudgetLimits
from common.errors import BudgetExceeded
from common.privacy.calibration import calibrate_noise_multiplier
from common.privacy.composition import epsilon_pld
from common.privacy.events import gaussian
from common.privacy.filter import filter_share_spent

LIMITS = BudgetLimits(1.0, 1e-5, 1.0)
DIGEST = "0" * 64


def test_receipt_hides_the_fingerprint_from_whoever_guesses_the_data(tmp_path: Path) -> None:
    """Two data sets that differ in one record must not be told apart by a digest that leaves the site."""
    event = gaussian(10.0)
    with Ledger.create(tmp_path / "ledger.db", "cohort") as ledger:
        ledger.declare_run("run", [event], LIMITS, fingerprint="f" * 64)
        before = ledger.head
        ledger.reserve("run", "round-1", [event], limits=LIMITS, fingerprint="f" * 64)
        exported = upkeep.export(ledger)["entries"][-1]
    # all that an attacker can know or try out: the receipt before, the time, the events and the guessed fingerprint
    known = {name: value for name, value in exported["body"].items() if name != "salt"}
    assert set(known) == {"events", "fingerprint"}
    entry = make_entry(before.seq + 1, "reserve", "run", "round-1", known, before.digest)
    assert (
        chained((entry.seq, exported["at"], entry.kind, entry.run_id, entry.round_key, _text(known), before.digest))
        != exported["digest"]
    )
    # with the secret bits the same arithmetic gives the receipt: nothing but the salt stood in the way
    whole = (
        entry.seq,
        exported["at"],
        entry.kind,
        entry.run_id,
        entry.round_key,
        _text(exported["body"]),
        before.digest,
    )
    assert chained(whole) == exported["digest"]
    assert len(exported["body"]["salt"]) == 32


def _text(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def test_salt_differs_in_every_entry(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db", "cohort") as ledger:
        for number in range(3):
            ledger.declare_run(f"run-{number}", [gaussian(30.0)], LIMITS, fingerprint="f")
        salts = [entry["body"].get("salt") for entry in upkeep.export(ledger)["entries"][1:]]
    assert len(set(salts)) == 3
    assert None not in salts


def test_plan_can_not_grow_past_the_filter_after_a_release(tmp_path: Path) -> None:
    """The first run's tighter bound holds for a plan fixed beforehand, not for one that grew on what was seen."""
    noise = calibrate_noise_multiplier(LIMITS.lifetime_epsilon, LIMITS.lifetime_delta, 1.0, 11)
    event = gaussian(noise)
    assert epsilon_pld([event] * 11, 1e-5) <= 1.0 < filter_share_spent([event] * 11, 1.0, 1e-5)
    with Ledger.create(tmp_path / "ledger.db", "cohort") as ledger:
        ledger.declare_run("run", [event] * 10, LIMITS, fingerprint="f")
        for number in range(1, 10):
            done = ledger.reserve("run", f"round-{number}", [event], limits=LIMITS, fingerprint="f")
            ledger.commit(done, DIGEST)
        ledger.reserve("run", "round-10", [event], limits=LIMITS, fingerprint="f")
        with pytest.raises(BudgetExceeded, match="lifetime"):
            ledger.reserve("run", "round-10", [event], limits=LIMITS, fingerprint="f")
        assert len(ledger.runs["run"].charged) == 10


def test_plan_can_grow_where_the_filter_has_room(tmp_path: Path) -> None:
    event = gaussian(30.0)
    with Ledger.create(tmp_path / "ledger.db", "cohort") as ledger:
        ledger.declare_run("run", [event], LIMITS, fingerprint="f")
        for _ in range(3):
            ledger.reserve("run", "round-1", [event], limits=LIMITS, fingerprint="f")
        assert len(ledger.runs["run"].charged) == 3


def test_unchanged_plan_keeps_its_bound_under_other_limits(tmp_path: Path) -> None:
    """A policy made stricter in mid-run does not turn a plan that still fits into one chosen late."""
    noise = calibrate_noise_multiplier(0.99, 1e-5, 1.0, 2)
    event = gaussian(noise)
    stricter = BudgetLimits(0.995, 1e-5, 0.995)
    with Ledger.create(tmp_path / "ledger.db", "cohort") as ledger:
        ledger.declare_run("run", [event] * 2, LIMITS, fingerprint="f")
        ledger.commit(ledger.reserve("run", "round-1", [event], limits=LIMITS, fingerprint="f"), DIGEST)
        ledger.reserve("run", "round-2", [event], limits=stricter, fingerprint="f")
        assert len(ledger.runs["run"].charged) == 2
