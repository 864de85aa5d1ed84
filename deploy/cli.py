"""The command line: `fedhypevae COMMAND`. Commands live in `deploy/commands/`, one module each.

A command module imports nothing heavy at its top, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from common.errors import ConfigError, FedHypeVAEError
from deploy.commands import (
    audit,
    data,
    demo,
    doctor,
    download,
    embed,
    evaluate,
    join,
    ledger,
    plan,
    predict,
    provision,
    release,
    report,
    run,
    server,
    site,
    status,
    stop,
    synthesize,
    train,
)
from deploy.console import say

TRY, HOSPITAL, COORDINATOR, RECEIVER = "Try it", "At a hospital", "At the coordinator", "With a published set"
MOVED = {("site", name): f"server {name}" for name in ("register", "list", "revoke", "rotate", "package")}


class _Commands(TyperGroup):
    """All commands; one that has a new name is refused with that name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the words name."""
        new = MOVED.get((args[0], args[1])) if len(args) > 1 else None
        if args[0] == "server" and len(args) > 1 and Path(args[1]).is_dir():
            new = f"server start {args[1]}"
        if new is not None and not ctx.resilient_parsing:  # a shell that completes words asks, too
            raise ConfigError(f"`fedhypevae {' '.join(args[:2])}` is now `fedhypevae {new}`")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="fedhypevae",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Publish one synthetic, differentially private set of labelled embeddings, together.",
)

app.command("demo", rich_help_panel=TRY)(demo.demo)
app.command("download", rich_help_panel=TRY)(download.download)

app.add_typer(site.app, name="site", rich_help_panel=HOSPITAL)
app.command("embed", rich_help_panel=HOSPITAL)(embed.embed)
app.add_typer(data.app, name="data", rich_help_panel=HOSPITAL)
app.command("plan", rich_help_panel=HOSPITAL)(plan.plan)
app.command("audit", rich_help_panel=HOSPITAL)(audit.audit)
app.command("doctor", rich_help_panel=HOSPITAL)(doctor.doctor)
app.add_typer(ledger.app, name="ledger", rich_help_panel=HOSPITAL)
app.command("join", rich_help_panel=HOSPITAL)(join.join)

app.command("provision", rich_help_panel=COORDINATOR)(provision.provision)
app.add_typer(server.app, name="server", rich_help_panel=COORDINATOR)
app.command("run", rich_help_panel=COORDINATOR)(run.run)
app.command("stop", rich_help_panel=COORDINATOR)(stop.stop)
app.command("status", rich_help_panel=COORDINATOR)(status.status)
app.command("report", rich_help_panel=COORDINATOR)(report.report)
app.add_typer(release.app, name="release", rich_help_panel=COORDINATOR)

app.command("evaluate", rich_help_panel=RECEIVER)(evaluate.evaluate)
app.command("train", rich_help_panel=RECEIVER)(train.train)
app.command("predict", rich_help_panel=RECEIVER)(predict.predict)
app.command("synthesize", rich_help_panel=RECEIVER)(synthesize.synthesize)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"fedhypevae {metadata.version('fedhypevae')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Run the command line; errors of the project become one line and their exit code."""
    os.umask(0o077)  # what a command or a program that it starts writes is its owner's, unless it is to be published
    try:
        app()
    except FedHypeVAEError as error:
        say(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
