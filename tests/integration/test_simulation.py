"""`flwr run` in simulation, with the settings that people change; on the demonstration's own images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from deploy.simulate import simulate

ROOT = Path(__file__).resolve().parents[2]
CACHE = str(ROOT / "outputs" / "cache")  # shared with `make demo`: the images are embedded once
QUICK = {"num-sites": 2, "min-sites": 2, "num-rounds": 3, "synthetic-rows": 220, "cache-dir": CACHE}


@pytest.mark.simulation
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 1.0, "alpha": 0.3, "encoder-training": "joint"},
        {
            "encoder-training": "unprotected",
            "code-dim": 3,
            "trunk-width": 4,
            "hidden-widths": "16",
            "mmd": "per-example",
            "mmd-weight": 0.1,
        },
        {"trust": "secagg", "num-sites": 4, "epsilon": 1.0},
    ],
    ids=["joint", "unprotected", "secagg"],
)
def test_flwr_run_completes_with_other_settings(tmp_path: Path, settings: dict[str, str | int | float]) -> None:
    output = simulate({**QUICK, **settings}, work_folder=tmp_path, app_folder=ROOT)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["rounds"] == 3
    encoder = settings.get("encoder-training", "sleep")
    assert summary["privacy"]["encoder_training"] == encoder
    assert summary["privacy"]["end_to_end"] is (encoder != "unprotected")
    assert summary["config"].items() >= settings.items()
    assert all(0.0 <= scores["accuracy"] <= 1.0 for scores in summary["scores"].values())


@pytest.mark.simulation
@pytest.mark.timeout(600)
def test_failing_run_fails_the_command(tmp_path: Path) -> None:
    """A run whose server refuses must not end as if all were well: `flwr run --stream` itself exits 0."""
    with pytest.raises(ConfigError, match="no checkpoint"):
        simulate({**QUICK, "resume": True}, work_folder=tmp_path, app_folder=ROOT)
