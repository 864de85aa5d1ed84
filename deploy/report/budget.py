"""What a site has spent and sent, for its own page: the ledger and the log of releases as meters and tables."""

from __future__ import annotations

from typing import Any

from client_app.ledger import upkeep
from client_app.ledger.ledger import Ledger
from client_app.ledger.upkeep import Spent
from client_app.place import Place
from client_app.release.log import ReleaseLog
from embeddings.quality.page import Grid


def read_spent(place: Place) -> Spent:
    """What the site's ledger says at its policy's δ (LedgerError where it can't be trusted)."""
    policy = place.policy
    witness = policy.witness_path(place.folder)
    with Ledger.open(policy.ledger_path(place.folder), None, witness, read_only=True, allow_moved=True) as ledger:
        return upkeep.spent(ledger, policy.lifetime_delta)


def budget_meters(place: Place, spent: Spent) -> list[dict[str, Any]]:
    """ε against its limit: of all runs, with the open ones' plans, and of each of the last five."""
    limits = place.policy.limits
    lines = [("All runs, for ever", spent.epsilon, limits.lifetime_epsilon)]
    if spent.epsilon_promised > spent.epsilon:
        lines.append(("with open runs", spent.epsilon_promised, limits.lifetime_epsilon))
    lines += [(run.run_id, run.epsilon, limits.run_epsilon) for run in spent.runs[-5:]]
    return [
        {"name": name, "percent": round(min(100 * value / limit, 100), 1), "text": f"{value:.2f} of {limit:g}"}
        for name, value, limit in lines
    ]


def run_grid(spent: Spent) -> Grid:
    """A line for every run of the ledger."""
    rows = tuple(
        (
            run.run_id,
            run.first_at[:16].replace("T", " "),
            run.last_at[:16].replace("T", " "),
            str(run.rounds_reserved),
            str(run.rounds_committed),
            f"{run.epsilon:.3f}",
            f"{run.epsilon_declared:.3f}",
            "closed" if run.closed else "open",
        )
        for run in spent.runs
    )
    columns = ("run", "from", "to", "charged", "released", "epsilon spent", "epsilon declared", "state")
    return Grid(columns, rows, (False, False, False, True, True, True, True, False))


def release_grid(place: Place) -> Grid:
    """A line for every run of the log of releases: how often, how much, and when last."""
    runs: dict[str, list[int]] = {}
    last: dict[str, str] = {}
    for release in ReleaseLog(place.folder / "releases.jsonl").read():
        runs.setdefault(release.run_id, []).append(release.payload_bytes)
        last[release.run_id] = release.at[:16].replace("T", " ")
    rows = tuple((run, str(len(sizes)), f"{sum(sizes):,}", last[run]) for run, sizes in runs.items())
    return Grid(("run", "releases", "bytes", "last"), rows, (False, True, True, False))
