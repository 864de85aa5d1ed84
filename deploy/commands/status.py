"""`fedhypevae status`: how far a federation is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.console import console, say

if TYPE_CHECKING:
    from rich.table import Table

    from deploy.machine.live import RunStatus


def status(
    path: Annotated[Path, typer.Argument(help="A run's output folder, or the server's folder.")] = Path(),
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds until the run ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The status as JSON.")] = False,
) -> None:
    """Show round, sites that answered, epsilon spent and time left of the newest run. Exit code 1 if it failed.

    Example: fedhypevae status /srv/fedhypevae-server --watch
    """
    import json
    import time

    from rich.live import Live

    from deploy.machine.live import POLL_S, find_status

    found = find_status(path)
    if as_json:
        shown = {
            **found.values,
            "state": found.state,
            "folder": str(found.folder),
            "age_seconds": round(found.age_s, 1),
        }
        say(json.dumps(shown, indent=2))
    elif not watch:
        console().print(_table(found))
    else:
        with Live(_table(found), console=console(), auto_refresh=False) as live:
            while found.state in ("waiting", "running", "silent"):
                time.sleep(POLL_S)
                found = find_status(path)
                live.update(_table(found), refresh=True)
    if found.state == "failed":
        raise typer.Exit(1)


def _table(found: RunStatus) -> Table:
    from rich.table import Table
    from rich.text import Text

    from deploy.machine.live import status_rows

    colours = {"running": "cyan", "completed": "green", "failed": "red", "silent": "yellow"}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in status_rows(found):
        style = colours.get(found.state, "") if name == "state" else "red" if name == "missing" else ""
        table.add_row(Text(name, style="dim"), Text(value, style=style))
    return table
