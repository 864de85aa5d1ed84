"""`fedhypevae doctor`: look a site or a server over; each fault in one line with its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import say, working


def doctor(
    folder: Annotated[Path, typer.Argument(help="The site's folder, or the server's.")],
    offline: Annotated[bool, typer.Option("--offline", help="Leave out ports and the link to the server.")] = False,
) -> None:
    """Look for faults; exit code 0 when there are none, 1 when there are.

    Example: fedhypevae doctor /srv/fedhypevae-site
    """

    from deploy.coordinator.folder import ServerFolder
    from deploy.doctor import advise_site, examine_server, examine_site
    from deploy.site.folder import SiteFolder

    advice: list[str] = []
    with working("looking"):
        if (folder / "server.toml").is_file():
            findings = examine_server(ServerFolder(folder))
        else:
            findings, advice = examine_site(SiteFolder(folder), online=not offline), advise_site(SiteFolder(folder))
    for line in [*findings, *advice]:
        say(line)
    say(f"{len(findings)} faults found" if findings else "no fault found")
    if findings:
        raise typer.Exit(1)
