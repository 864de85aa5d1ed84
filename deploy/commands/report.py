"""`fedhypevae report`: the coordinator's page about a completed run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import console, working


def report(
    run: Annotated[Path, typer.Argument(help="The run's output folder, or a released bundle.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where the page goes; default: RUN/report.html, or BUNDLE-report.html beside a bundle."),
    ] = None,
) -> None:
    """Write one HTML page about a run: what was trained, what it cost, what it gave, what it does not protect.

    It holds nothing but what was published. A site's own page, with its records in it, is made at the site:
    `fedhypevae site report`.

    Example: fedhypevae report outputs/demo
    """

    from common.durable import NAME_ANOTHER, write_output
    from common.errors import ConfigError, DataError
    from deploy.report.run import is_bundle, read_run, render_run

    released = is_bundle(run)
    beside = run.resolve().with_name(f"{run.resolve().name}-report.html") if released else run / "report.html"
    page = beside if out is None else out
    if released and page.resolve().is_relative_to(run.resolve()):
        raise ConfigError(f"{page} lies in the bundle, whose files are signed: name another place with --out")
    with working("Reading the run and drawing ..."):
        text = render_run(read_run(run))
    write_output(page, text.encode(), kind=DataError, cure=NAME_ANOTHER)
    console().print(f"page: {page}", soft_wrap=True)
