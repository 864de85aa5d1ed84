"""`fedhypevae demo`: four simulated hospitals, real CT images, one private generator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ConfigError

SETTINGS: dict[str, str | int | float | bool] = {"num-sites": 4, "min-sites": 4, "output-dir": "outputs/demo"}


def demo(
    rounds: Annotated[int, typer.Option(help="Rounds of training.")] = 25,
    epsilon: Annotated[float, typer.Option(help="Privacy budget of each site, at delta = 1e-5.")] = 3.0,
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration of the sites; 0 is an even split.")] = 0.0,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, KEY=VALUE; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Flower's own log too.")] = False,
) -> None:
    """Train on the project's own CT images with four simulated hospitals; results in outputs/demo.

    Example: fedhypevae demo --rounds 20 --epsilon 1 --set latent-dim=8
    """
    from deploy.simulation.demonstration import check_settings, clear_output, present
    from deploy.simulation.simulate import simulate

    app_folder = Path(__file__).resolve().parents[2]
    work_folder = Path(os.environ.get("FEDHYPEVAE_HOME") or Path.cwd()).resolve()
    settings = {**SETTINGS, "num-rounds": rounds, "epsilon": epsilon, "alpha": alpha, "resume": resume}
    settings |= dict(parse_setting(text) for text in setting or [])
    output = work_folder / str(settings["output-dir"])
    check_settings(work_folder, settings, app_folder)
    if not resume:
        clear_output(output)
    simulate(settings, work_folder=work_folder, app_folder=app_folder, verbose=verbose)
    present(output, work_folder)


def parse_setting(text: str) -> tuple[str, str | int | float | bool]:
    """`KEY=VALUE` as a flat setting: numbers and true/false are read as such (ConfigError if there is no =)."""
    key, found, value = text.partition("=")
    if not found:
        raise ConfigError(f"a setting is KEY=VALUE, found {text!r}")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value
