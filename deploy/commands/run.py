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
    sites: Annotated[
        str, typer.Option(help="Names of the sites that take part, with commas; default: all that are online.")
    ] = "",
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
    given = run_config(settings, sites=sites or None, resume=resume or None)
    if sites and not any(pair.startswith("num-sites=") for pair in settings or ()):
        given = given.replace(num_sites=len(given.operation.chosen_sites))
    config = in_own_folder(server, given)
    run_id = start_run(server, app_folder.resolve(), config)
    say(f"run {run_id}: results will lie in {server.work / config.operation.output_dir}")
    try:
        output = follow(server, run_id, config, typer.echo)
    except KeyboardInterrupt:
        say(f"run {run_id} goes on without this command")
        say(f"to follow it: fedhypevae status {folder} --watch; to stop it: fedhypevae stop {folder}")
        raise typer.Exit(130) from None
    say(f"completed: {output / 'summary.json'}")
