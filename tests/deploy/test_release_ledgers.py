"""What of a site's ledger a bundle shows: its own rows only where the site's data is public."""

from __future__ import annotations

import json
from pathlib import Path

from client_app.ledger.ledger import Ledger
from client_app.ledger.limits import BudgetLimits
from common.privacy.events import gaussian
from deploy.release.ledgers import check_published, published_rows, read_ledger
from tests.deploy.release_cases import CONTEXT

FINGERPRINT = "f" * 64


def test_release_keeps_a_private_sites_ledger_rows_to_itself(tmp_path: Path) -> None:
    """A ledger names the fingerprint of the records: a function of them without noise."""
    events, limits = [gaussian(5.0, label="statistics")], BudgetLimits(3.0, 1e-5, 3.0)
    with Ledger.create(tmp_path / "ledger.db", "cohort") as ledger:
        ledger.declare_run("run", events, limits, fingerprint=FINGERPRINT)
        ledger.reserve("run", "statistics", events, limits=limits, fingerprint=FINGERPRINT)
        receipt = str(ledger.head)
    found = read_ledger(tmp_path / "ledger.db")
    private = published_rows(found, "run", "site-1", events, False)
    check_published(private, "run", "site-1", receipt, events, CONTEXT)
    assert FINGERPRINT not in json.dumps(private)
    assert {frozenset(row) for row in private["rows"]} == {frozenset({"event", "previous", "digest"})}
    assert FINGERPRINT in json.dumps(published_rows(found, "run", "site-1", events, True))  # the control
