"""`fedhypevae provision`: from one TOML file to certificates, settings, units and a checklist."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import say


def provision(
    plan: Annotated[Path, typer.Argument(help="TOML file with name, server_names and sites.")],
    out: Annotated[Path, typer.Option(help="A new folder for all that is written.")] = Path("federation"),
) -> None:
    """Write the server's folder, one folder to send to each site, and a checklist.

    Example: fedhypevae provision study.toml --out federation

    where study.toml says: name = "study", server_names = ["fl.example.org"], sites = ["st-anna", "charite"]
    """
    from deploy.coordinator.provision import FederationPlan
    from deploy.coordinator.provision import provision as write_all

    written = write_all(FederationPlan.read(plan), out)
    for path in written:
        say(f"wrote {path}")
    say(f"next: {out / 'CHECKLIST.md'}")
