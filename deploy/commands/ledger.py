"""`fedhypevae ledger`: look at a site's privacy ledger, check it, copy it, and look after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.console import console, say, working

if TYPE_CHECKING:
    from rich.table import Table

    from client_app.ledger.ledger import Ledger
    from client_app.ledger.upkeep import Spent

app = typer.Typer(no_args_is_help=True, help="Show, check, copy and move a site's privacy ledger.")

LedgerPath = Annotated[Path, typer.Argument(metavar="PATH", help="The ledger's file at the site.")]
Destination = Annotated[Path, typer.Argument(metavar="DESTINATION", help="A file that does not exist yet.")]
WitnessPath = Annotated[
    Path | None, typer.Option("--witness", help="The file that keeps the ledger's head at a second place.")
]


@app.command("create")
def create(
    path: LedgerPath,
    cohort: Annotated[str, typer.Option(help="Permanent name of the people the data is about.")],
    witness: WitnessPath = None,
) -> None:
    """Make a site's ledger, once, at enrolment.

    Example: fedhypevae ledger create /srv/site/ledger.db --cohort st-anna-breast --witness
    /mnt/b/witness.json
    """
    from client_app.ledger.ledger import Ledger

    with Ledger.create(path, cohort, witness) as ledger:
        say(f"created {path} for cohort {cohort}; receipt {ledger.head}")


@app.command("show")
def show(
    path: LedgerPath,
    witness: WitnessPath = None,
    delta: Annotated[float | None, typer.Option(help="The delta to state epsilon at; default: the last run's.")] = None,
) -> None:
    """Print what was spent, by run and overall, and what is left; takes seconds (ε comes from the events).

    Example: fedhypevae ledger show /srv/site/ledger.db
    """

    from client_app.ledger import upkeep
    from common.privacy.filter import filter_share_spent

    with _opened(path, witness, read_only=True, allow_moved=True) as ledger:
        runs = list(ledger.runs.values())
        printed = console()
        printed.print(f"Cohort {ledger.cohort_id}, {ledger.head.seq} entries, head {ledger.head.digest}")
        if not runs:
            printed.print("Nothing was ever asked for: the whole budget is left.")
            return
        limits = runs[-1].limits
        stated = limits.lifetime_delta if delta is None else delta
        with working("composing the privacy loss of every run"):
            figures = upkeep.spent(ledger, stated)
            counted = [event for run in runs for event in run.counted]
            share = filter_share_spent(counted, limits.lifetime_epsilon, limits.lifetime_delta)
    printed.print(_table(figures))
    printed.print(
        f"All runs: epsilon {figures.epsilon:.4g} spent, {figures.epsilon_promised:.4g} with what open runs "
        f"may still spend, at delta {stated:g}, for adding or removing one {limits.unit}."
    )
    printed.print(
        f"The last run's policy allowed epsilon {limits.lifetime_epsilon:g} at delta "
        f"{limits.lifetime_delta:g} for ever: {min(share, 1.0):.1%} of that budget is spent or promised."
    )


def _table(figures: Spent) -> Table:
    from rich.table import Table

    table = Table("run", "from", "to", "rounds", "released", "epsilon spent", "epsilon declared", "state")
    for run in figures.runs:
        table.add_row(
            run.run_id,
            run.first_at[:10],
            run.last_at[:10],
            str(run.rounds_reserved),
            str(run.rounds_committed),
            f"{run.epsilon:.4g}",
            f"{run.epsilon_declared:.4g}",
            "closed" if run.closed else "open",
        )
    return table


@app.command("verify")
def verify(
    path: LedgerPath,
    witness: WitnessPath = None,
    receipt: Annotated[
        str | None, typer.Option(help="A head noted earlier, such as the server's: NUMBER:DIGEST.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="The site's release log, to be checked as well.")] = None,
) -> None:
    """Check every entry, the witness, a receipt and the release log; exit code 1 if anything is off.

    Example: fedhypevae ledger verify /srv/site/ledger.db --witness /mnt/b/witness.json --receipt 12:5f0c...
    """
    from client_app.ledger.chain import Head
    from client_app.release.log import ReleaseLog

    with _opened(path, witness, read_only=True, allow_moved=True) as ledger:
        head = ledger.verify(None if receipt is None else Head.parse(receipt))
        say(f"ledger {path}: {head.seq} entries, unbroken")
        if log is not None:
            committed = frozenset(
                known.payload_digest
                for run in ledger.runs.values()
                for known in run.rounds.values()
                if known.payload_digest is not None
            )
            say(f"release log {log}: {ReleaseLog(log).verify(committed)} releases, all committed")
        say(f"receipt {head}")


@app.command("export")
def export(path: LedgerPath, destination: Destination, witness: WitnessPath = None) -> None:
    """Write every entry as JSON, for a data protection officer or a privacy statement.

    Example: fedhypevae ledger export /srv/site/ledger.db ledger.json
    """
    from client_app.ledger import upkeep
    from common.errors import DataError

    if destination.exists():
        raise DataError(f"{destination} exists already: name a file that does not")
    with _opened(path, witness, read_only=True, allow_moved=True) as ledger:
        upkeep.export_to(ledger, destination)
        say(f"wrote {ledger.head.seq} entries to {destination}")


@app.command("backup")
def backup(path: LedgerPath, destination: Destination, witness: WitnessPath = None) -> None:
    """Copy the ledger, also while runs use it. For reading: put back later, it forgot what was spent.

    Example: fedhypevae ledger backup /srv/site/ledger.db /mnt/backup/ledger-2026-11-21.db
    """
    from client_app.ledger import upkeep

    with _opened(path, witness, read_only=True) as ledger:
        say(f"copied to {destination}; receipt {upkeep.backup(ledger, destination)}")


@app.command("move")
def move(path: LedgerPath, destination: Destination, witness: WitnessPath = None) -> None:
    """Move the ledger to another disk; the old file stays and refuses every further use.

    Example: fedhypevae ledger move /srv/site/ledger.db /data/site/ledger.db --witness /mnt/b/witness.json
    """
    from client_app.ledger import upkeep

    with _opened(path, witness, allow_moved=True) as ledger:
        head = upkeep.move(ledger, destination)
    say(f"moved to {destination}; receipt {head}. Name the new file in policy.toml (ledger = ...)")


@app.command("close")
def close(
    path: LedgerPath,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name, as `ledger show` prints it.")],
    witness: WitnessPath = None,
) -> None:
    """End a run for good: what it declared but did not spend is free for others.

    Example: fedhypevae ledger close /srv/site/ledger.db spring-run --witness /mnt/b/witness.json
    """
    with _opened(path, witness) as ledger:
        say(f"closed {run}; receipt {ledger.close_run(run, 'closed by the site')}")


@app.command("witness")
def accept_witness(
    path: LedgerPath,
    witness: Annotated[Path, typer.Argument(metavar="WITNESS", help="The witness file to be written again.")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
) -> None:
    """Accept the ledger as it stands and write a missing or unfitting witness again.

    Only for a person who knows that this ledger is the newest one: an older one forgot what was spent.

    Example: fedhypevae ledger witness /srv/site/ledger.db /mnt/b/witness.json
    """
    from client_app.ledger import upkeep

    with _opened(path, None) as ledger:
        if not yes:
            typer.confirm(f"Is {path}, with {ledger.head.seq} entries, the newest ledger of this site?", abort=True)
        say(f"wrote {witness}; receipt {upkeep.accept_witness(ledger, witness)}")


def _opened(path: Path, witness: Path | None, *, read_only: bool = False, allow_moved: bool = False) -> Ledger:
    """A ledger for a command, whichever cohort it belongs to."""
    from client_app.ledger.ledger import Ledger

    return Ledger.open(path, None, witness, read_only=read_only, allow_moved=allow_moved)
