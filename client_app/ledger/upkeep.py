"""Looking after a ledger: what was spent, in figures; export, backup, and moving it to another disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client_app.ledger.chain import COLUMNS, Head
from client_app.ledger.ledger import Ledger
from client_app.ledger.store import check_not_moved, open_store
from common.durable import NAME_ANOTHER, write_output
from common.errors import LedgerError
from common.privacy.composition import epsilon_from_rdp, epsilon_pld, rdp_curve


@dataclass(frozen=True)
class RunSpent:
    """One run's figures: ε by PLD (add/remove of one `unit`) of what it was charged and what it declared."""

    run_id: str
    unit: str
    epsilon: float
    epsilon_declared: float
    rounds_reserved: int
    rounds_committed: int
    first_at: str
    last_at: str
    closed: bool


@dataclass(frozen=True)
class Spent:
    """The lifetime's figures at one δ.

    `epsilon` bounds all charged events as one block (by PLD for a single run, by RDP for several);
    `epsilon_promised` also counts what open runs may still be charged for.
    """

    delta: float
    epsilon: float
    epsilon_promised: float
    runs: tuple[RunSpent, ...]
    head: Head


def spent(ledger: Ledger, delta: float) -> Spent:
    """Add up the ledger in figures.

    Args:
        ledger: an open one.
        delta: δ at which ε is stated, in (0, 1).

    Returns:
        ε overall and per run, for add/remove of one unit. Takes seconds: several compositions.

    Raises:
        ConfigError: δ out of range.
    """
    runs = ledger.runs.values()
    figures = tuple(
        RunSpent(
            run_id=run.run_id,
            unit=run.limits.unit,
            epsilon=epsilon_pld(run.charged, delta),
            epsilon_declared=epsilon_pld(run.planned, delta),
            rounds_reserved=len(run.rounds),
            rounds_committed=sum(known.payload_digest is not None for known in run.rounds.values()),
            first_at=run.first_at,
            last_at=run.last_at,
            closed=run.closed,
        )
        for run in runs
    )
    charged = [run.charged for run in runs if run.charged]
    promised = [run.counted for run in runs if run.counted]
    return Spent(delta, _together(charged, delta), _together(promised, delta), figures, ledger.head)


def _together(blocks: Sequence[Sequence[Any]], delta: float) -> float:
    """ε of all blocks: one declared block by PLD; several, each chosen after the others were seen, by RDP."""
    if not blocks:
        return 0.0
    if len(blocks) == 1:
        return epsilon_pld(blocks[0], delta)
    return epsilon_from_rdp(rdp_curve([event for block in blocks for event in block]), delta)


def export(ledger: Ledger) -> dict[str, Any]:
    """The whole ledger as JSON values: cohort, head and every entry."""
    entries = [{**dict(zip(COLUMNS, entry.row, strict=True)), "body": entry.body} for entry in ledger.entries]
    return {"cohort_id": ledger.cohort_id, "head": asdict(ledger.head), "entries": entries}


def export_to(ledger: Ledger, destination: Path) -> None:
    """Write `export` to a file, whole or not at all. Raises LedgerError if the disk refuses."""
    write_output(destination, json.dumps(export(ledger), indent=1).encode(), kind=LedgerError, cure=NAME_ANOTHER)


def backup(ledger: Ledger, destination: Path) -> Head:
    """Copy a ledger as it is now, and check the copy.

    A backup put back later is a rolled-back ledger: the witness says so, since it forgot what was spent
    since.

    Raises:
        LedgerError: the destination exists, or can't be written or verified.
    """
    ledger.store.copy_to(destination)
    with closing(open_store(destination, None, read_only=True)) as copy:
        return copy.head


def move(ledger: Ledger, destination: Path) -> Head:
    """End a ledger for ever with a last entry, then let a copy of it, which alone goes on, appear elsewhere.

    The order makes two live ledgers impossible: between the two steps there is none. Killed in between, the
    same call completes it.

    Args:
        ledger: the one to be moved; its witness stays where it is.
        destination: a file that does not exist, on a local disk.

    Returns:
        The head of the moved ledger.

    Raises:
        LedgerError: the destination exists or can't be written, or the ledger was moved elsewhere before.
    """
    target, store = str(destination.absolute()), ledger.store
    if destination.exists():
        raise LedgerError(f"{destination} exists already: name a file that does not")
    if not destination.parent.is_dir():
        raise LedgerError(f"{destination.parent} is not a folder: make it first")
    if store.entries[-1].kind != "moved":
        with store.writing():
            if store.entries[-1].kind != "moved":
                store.append("moved", "", "", {"destination": target})
    if store.entries[-1].body["destination"] != target:
        check_not_moved(store)

    def arrive(partial: Path) -> None:
        # refuses a copy that forgets what was spent since
        with closing(open_store(partial, store.witness_path)) as copy:
            copy.witness_path = None  # not before the file has its name: a kill would leave the witness ahead
            with copy.writing():
                copy.append("arrived", "", "", {"destination": target})

    store.copy_to(destination, finish=arrive)
    with closing(open_store(destination, store.witness_path)) as moved:
        moved.note_head()
        return moved.head


def accept_witness(ledger: Ledger, witness_path: Path) -> Head:
    """Write a witness again, after a person decided that this ledger is the newest there is."""
    ledger.store.witness_path = witness_path
    ledger.store.note_head(replace=True)
    return ledger.head
