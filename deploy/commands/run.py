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
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run that is not complete, or output-dir's.")
    ] = False,
) -> None:
    """Start a run on the server and follow it; ending this command leaves the run going.

    Each run has a folder of its own: work/outputs/run, then run-2, and so on, or the one that output-dir names.

    Example: fedhypevae run /srv/fedhypevae-server --set num-sites=3 --set num-rounds=40
    """
    from deploy.coordinator.folder import server_folder
    from deploy.coordinator.run import follow, in_own_folder, start_run
    from deploy.settings import run_config

    server = server_folder(folder.resolve())
    config = in_own_folder(server, run_config(settings, resume=resume or None))
    run_id = start_run(server, app_folder.resolve(), config)
    say(f"run {run_id}: results will lie in {server.work / config.operation.output_dir}")
    output = follow(server, run_id, config, typer.echo)
    say(f"completed: {output / 'summary.json'}")
