"""`fedhypevae run`: run the app on a deployed server, and follow it to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import say


def run(
    folder: Annotated[Path, typer.Argument(help="The server's folder.")],
    app_folder: Annotated[Path, typer.Option("--app", help="The project's folder, with its pyproject.toml.")] = Path(),
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value; may be repeated.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint of the same output-dir.")] = False,
) -> None:
    """Start a run on the server and follow it; ending this command leaves the run going.

    Example: fedhypevae run /srv/fedhypevae-server --set num-sites=3 --set num-rounds=40
    """
    from deploy.coordinator.folder import server_folder
    from deploy.coordinator.run import follow, start_run
    from deploy.settings import run_config

    server = server_folder(folder.resolve())
    config = run_config(settings, resume=resume or None)
    run_id = start_run(server, app_folder.resolve(), config)
    output = follow(server, run_id, config, typer.echo)
    say(f"completed: {output / 'summary.json'}")
