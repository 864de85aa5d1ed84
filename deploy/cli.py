"""The command line: `fedhypevae COMMAND`. Commands live in `deploy/commands/`, one module each.

A command module imports nothing heavy at its top, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys

import typer

from common.errors import FedHypeVAEError
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
    synthesize,
    train,
)
from deploy.console import say

app = typer.Typer(
    name="fedhypevae",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Publish one synthetic, differentially private set of labelled embeddings, together.",
)

app.command("demo")(demo.demo)
app.add_typer(ledger.app, name="ledger")
app.command("download")(download.download)
app.command("embed")(embed.embed)
app.add_typer(data.app, name="data")
app.command("provision")(provision.provision)
app.command("server")(server.server)
app.add_typer(site.app, name="site")
app.command("run")(run.run)
app.command("status")(status.status)
app.command("plan")(plan.plan)
app.command("synthesize")(synthesize.synthesize)
app.add_typer(release.app, name="release")
app.command("report")(report.report)
app.command("evaluate")(evaluate.evaluate)
app.command("train")(train.train)
app.command("predict")(predict.predict)
app.command("join")(join.join)
app.command("audit")(audit.audit)
app.command("doctor")(doctor.doctor)


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
