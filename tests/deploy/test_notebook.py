"""The example notebook runs from top to bottom, on a small bundle, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "deploy" / "examples" / "bundle.ipynb"
# Each cell is compiled under its own name in one namespace, as a kernel does; a figure is drawn without a screen.
RUNNER = """
import json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
"""


def run_notebook(bundle: Path, records: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the notebook in an empty folder."""
    places = {"FEDHYPEVAE_BUNDLE": str(bundle), "FEDHYPEVAE_RECORDS": str(records), "MPLBACKEND": "Agg"}
    path = os.pathsep.join([str(NOTEBOOK.parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", RUNNER, str(NOTEBOOK)],
        cwd=folder,
        env={**os.environ, **places, "PYTHONPATH": path, "MPLCONFIGDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(released: Any, tmp_path: Path) -> None:
    done = run_notebook(released.bundle, released.sites / "site-1" / "site.parquet", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "private: yes" in done.stdout
    assert "site-2: epsilon 2.5" in done.stdout
    assert "50000 rows drawn" in done.stdout
    assert all(f"{kind}: own" in done.stdout for kind in ("linear", "mlp", "knn"))


def test_notebook_stops_where_a_cell_fails(released: Any, tmp_path: Path) -> None:
    done = run_notebook(tmp_path / "none", released.sites / "site-1" / "site.parquet", tmp_path)
    assert done.returncode != 0
    assert "no generator.safetensors at" in done.stderr


def test_notebook_is_kept_without_outputs() -> None:
    """What a run printed belongs to whoever ran it, and may come from records."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code"
    )
