"""`fedhypevae server`: start a federation's server, pack the app for its sites, and register and revoke sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import console, say

app = typer.Typer(no_args_is_help=True, help="Start a federation's server, and decide which sites it lets in.")

ServerFolder = Annotated[Path, typer.Argument(help="The server's folder, as `fedhypevae provision` made it.")]
PublicKey = Annotated[Path, typer.Argument(help="The site's node.pub.")]


@app.command("start")
def start(
    folder: ServerFolder,
    only: Annotated[str, typer.Option(help="One of its programs alone: superlink or server-app.")] = "",
) -> None:
    """Run the server until it is stopped: the link to the sites, and the process that runs the app.

    Example: fedhypevae server start /srv/fedhypevae-server
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


@app.command("package")
def package(
    app_folder: Annotated[Path, typer.Argument(help="The project's folder.")],
    out: Annotated[Path, typer.Option(help="Where the package goes.")],
) -> None:
    """Pack the app for the sites to read and approve, and print its digest.

    Example: fedhypevae server package . --out app.fab
    """
    from deploy.machine.app_contents import read_files
    from deploy.machine.app_package import build_package, digest_of
    from deploy.machine.keys import write_new

    content = build_package(app_folder)
    read_files(content)  # what a site would refuse is found here
    write_new(out, content)
    say(f"{out}: digest {digest_of(content)}")


@app.command("register")
def register(
    folder: ServerFolder, name: Annotated[str, typer.Argument(help="The site's name.")], key: PublicKey
) -> None:
    """Let a site in by its public key.

    Example: fedhypevae server register /srv/fedhypevae-server st-anna node.pub
    """
    from deploy.coordinator import registry
    from deploy.coordinator.folder import server_folder

    site = registry.register(server_folder(folder), name, key)
    say(f"registered {site.name} with key {site.fingerprint}: is it the one that the site read out by telephone?")


@app.command("list")
def list_all(folder: ServerFolder) -> None:
    """Show all sites, their keys, and who is online.

    Example: fedhypevae server list /srv/fedhypevae-server
    """
    from rich.table import Table

    from deploy.coordinator import registry
    from deploy.coordinator.folder import server_folder

    table = Table("site", "status", "key", "since", "node")
    for site in registry.list_sites(server_folder(folder)):
        table.add_row(site.name, site.status, site.fingerprint, site.since, site.node_id)
    console().print(table)


@app.command("revoke")
def revoke(folder: ServerFolder, name: Annotated[str, typer.Argument(help="The site's name, or its node.")]) -> None:
    """Shut a site out; its key is refused from now on.

    Example: fedhypevae server revoke /srv/fedhypevae-server st-anna
    """
    from deploy.coordinator import registry
    from deploy.coordinator.folder import server_folder

    site = registry.revoke(server_folder(folder), name)
    say(f"revoked {site.name}, key {site.fingerprint}")


@app.command("rotate")
def rotate(
    folder: ServerFolder,
    name: Annotated[str, typer.Argument(help="The site's name.")],
    key: PublicKey,
    forget: Annotated[bool, typer.Option("--forget", help="Forget its ledger's last receipt, too.")] = False,
) -> None:
    """Replace a site's key by the one that `site renew-key` made there.

    With --forget the site is not held to its old ledger any more: only where its people say that it was rightly begun
    again, since a new ledger has forgotten what was spent.

    Example: fedhypevae server rotate /srv/fedhypevae-server st-anna node.pub
    """
    from deploy.coordinator import registry
    from deploy.coordinator.folder import server_folder

    site = registry.rotate(server_folder(folder), name, key, forget=forget)
    say(f"{site.name} now has key {site.fingerprint}; the old one is refused")
