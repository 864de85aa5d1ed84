"""A ServerApp for one test: the project's own, run once for each method, by name, within one `flwr run`.

Starting Flower's simulation takes longer than three rounds of any method. Settings, sites and messages are those of any
run; only the names differ from one to the next.
"""

from __future__ import annotations

import shutil

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.config.presets import as_expert, resolve_listed
from common.methods import method_names
from server_app.app import app as project_app
from server_app.app import work_folder

# beside each method with its own defaults
OTHERS: dict[str, dict[str, str | int | float]] = {
    "unprotected": {
        "encoder-training": "unprotected",
        "code-dim": 3,
        "trunk-width": 4,
        "hidden-widths": "16",
        "mmd": "per-example",
        "mmd-weight": 0.1,
    },
}

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every method, each into a folder of its own below `output-dir`; a failure of one ends all as failed."""
    given = resolve_listed(context.run_config)
    base = given.operation.output_dir
    for name, settings in {**{name: {"method": name} for name in method_names()}, **OTHERS}.items():
        config = as_expert(given.replace(**settings, output_dir=f"{base}/{name}"))
        project_app(
            grid, Context(context.run_id, context.node_id, context.node_config, RecordDict(), {"expert": config})
        )
        shutil.copy(work_folder() / base / name / "status.json", work_folder() / base / "status.json")
