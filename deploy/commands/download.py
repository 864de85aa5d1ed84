"""`fedhypevae download`: the first paper's own image sets, from their publishers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ConfigError
from deploy.console import say


def download(
    name: Annotated[str, typer.Argument(help="organsmnist or milk10k.")],
    out: Annotated[Path | None, typer.Option(help="Folder; by default downloads/NAME.")] = None,
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="Accept the licence unasked.")] = False,
) -> None:
    """Fetch a public image set from its own publisher; needs the internet. Nothing is redistributed.

    Example: fedhypevae download organsmnist --accept-licence
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from deploy.simulation.download import SOURCES, Advance
    from deploy.simulation.download import download as fetch_source

    if name not in SOURCES:
        raise ConfigError(f"unknown image set {name!r}: expected one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    folder = out or Path("downloads") / name
    say(f"{source.title}\nfrom {source.page}\nlicence: {source.licence}")
    if not accept_licence and not _agreed():
        raise ConfigError("the licence was not accepted, so nothing was fetched: read it, then add --accept-licence")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn()) as bars:

        def started(file: str, size: int | None) -> Advance:
            return partial(bars.advance, bars.add_task(file, total=size))

        fetch_source(source, folder, started)
    labels = f" --labels {folder / source.labels}" if source.labels else ""
    say(
        f"{folder} is complete. The paper's setting, from here:\n"
        f"  fedhypevae embed {folder / source.images}{labels} --encoder dinov2-base --revision COMMIT "
        f"--out downloads/{name}.parquet\n"
        f"  flwr run . local --stream --federation-config num-supernodes=10 --run-config {source.settings}"
    )


def _agreed() -> bool:
    """Ask on a terminal; where there is none, nobody agreed."""
    import sys

    return sys.stdin.isatty() and typer.confirm("Do you accept this licence?", default=False)
