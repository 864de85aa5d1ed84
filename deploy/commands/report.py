"""`fedhypevae report`: the coordinator's page about a completed run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The run's output folder, or a released bundle with its summary.json.")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes; default: RUN/report.html.")] = None,
) -> None:
    """Write one HTML page about a run: what was trained, what it cost, what it gave, what it does not protect.

    It holds nothing but what was published. A site's own page, with its records in it, is made at the site:
    `fedhypevae site report`.

    Example: fedhypevae report outputs/demo
    """
    from rich.console import Console

    from common.durable import write_atomically
    from common.errors import DataError
    from deploy.report.run import read_run, render_run

    page = run / "report.html" if out is None else out
    with Console(stderr=True).status("Reading the run and drawing ..."):
        text = render_run(read_run(run))
    try:
        write_atomically(page, text.encode())
    except OSError as error:
        raise DataError(f"{page}: can't write there ({error.strerror})") from None
    Console().print(f"page: {page}", highlight=False, soft_wrap=True)
