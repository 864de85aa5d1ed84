"""Runs of pytest in forks of a process that has the libraries loaded, and nothing of the project: half of the time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

_LIBRARIES = (
    "cryptography.hazmat.primitives.asymmetric.ec",
    "dp_accounting.pld.privacy_loss_distribution",
    "flwr.app",
    "flwr.clientapp",
    "hypothesis.extra.numpy",
    "opacus.accountants",
    "pyarrow.parquet",
    "pydantic",
    "pytest",
    "safetensors.torch",
    "scipy.stats",
    "torch",
    "typer.testing",
)


def make_context(libraries: Sequence[str] = _LIBRARIES) -> ForkServerContext:
    """A server of forks; its libraries are loaded at the first run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(libraries))
    return context


def run_pytest(context: ForkServerContext, folder: Path, arguments: Sequence[str], output: Path) -> int:
    """Exit code of pytest with these arguments, started in a folder whose modules it imports; output into a file."""
    process = context.Process(target=_run, args=(folder, tuple(arguments), output))
    process.start()
    process.join()
    return process.exitcode if process.exitcode is not None else -1


def _run(folder: Path, arguments: Sequence[str], output: Path) -> None:
    with output.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    here = Path(__file__).resolve().parents[2]
    sys.path[:] = [str(folder), *(path for path in sys.path if path and Path(path).resolve() != here)]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": str(folder), "FLWR_HOME": str(folder / ".flwr"), "FEDHYPEVAE_HOME": str(folder)}
    import pytest

    sys.exit(int(pytest.main(list(arguments))))
