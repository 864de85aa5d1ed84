"""`fedhypevae demo`: four simulated hospitals, real CT images, one private generator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def demo(
    rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy budget of each site, at delta = 1e-5.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Dirichlet concentration of the sites; 0 is an even split.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, KEY=VALUE; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last checkpoint.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Flower's own log too.")] = False,
) -> None:
    """Train on the project's own CT images with four simulated hospitals; results in outputs/demo.

    Example: fedhypevae demo --rounds 20 --epsilon 1 --set latent-dim=8
    """
    from common.methods import get_method
    from deploy.machine.app_package import INSTALLED
    from deploy.settings import run_config
    from deploy.simulation.demonstration import alone_in, check_resume, clear_output, present
    from deploy.simulation.simulate import simulate

    config = run_config(setting, "demo", num_rounds=rounds, epsilon=epsilon, alpha=alpha, resume=resume or None)
    work_folder = Path(os.environ.get("FEDHYPEVAE_HOME") or Path.cwd()).resolve()
    output = work_folder / config.operation.output_dir
    check_resume(config, output)
    get_method(config.method).plan(config)  # what no run can have is refused before an earlier one is removed
    with alone_in(output):
        if not config.operation.resume:
            clear_output(output)
        simulate(config, work_folder=work_folder, app_folder=INSTALLED, verbose=verbose)
        present(output, work_folder)
