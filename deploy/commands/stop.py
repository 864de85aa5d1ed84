"""`fedhypevae stop`: stop the run that is going on at a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import say


def stop(folder: Annotated[Path, typer.Argument(help="The server's folder.")]) -> None:
    """Stop the run that is going on. What was done stays on the disk, and what was charged stays charged.

    Example: fedhypevae stop /srv/fedhypevae-server
    """
    from deploy.coordinator.folder import server_folder
    from deploy.coordinator.run import stop_run

    server = server_folder(folder.resolve())
    say(f"stopped run {stop_run(server)}; to go on with it: fedhypevae run {server.path} --resume")
