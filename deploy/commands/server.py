"""`fedhypevae server`: run the server of a federation, watched over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import say


def server(
    folder: Annotated[Path, typer.Argument(help="The server's folder, as `fedhypevae provision` made it.")],
    only: Annotated[str, typer.Option(help="One of its programs alone: superlink or server-app.")] = "",
) -> None:
    """Run the server until told to stop: the link to the sites, and the process that runs the app.

    Example: fedhypevae server /srv/fedhypevae-server
    """
    import threading

    from common.durable import keep_private, make_private
    from common.errors import ConfigError
    from deploy.coordinator.folder import server_folder
    from deploy.machine.live import find_status, watch_run
    from deploy.machine.supervise import stop_on_signals, supervise

    place = server_folder(folder.resolve())
    make_private(place.work)
    for path in keep_private(place.path):
        say(f"others can read {path}: it belongs to somebody else")
    stop = threading.Event()
    stop_on_signals(stop)
    programs = tuple(program for program in place.programs() if only in {"", program.name})
    if not programs:
        raise ConfigError(f"--only must be superlink or server-app, found {only!r}")
    watch_run(lambda: find_status(place.path), stop, lambda line: say(line))
    supervise(programs, place.environment(), place.work, stop, lambda line: say(line))
