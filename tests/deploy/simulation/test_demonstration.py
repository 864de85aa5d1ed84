"""The demonstration's picture is drawn from what is there, and never hides a run that is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.config.run import RunConfig
from common.evaluation.heads import fit_linear_head
from deploy.simulation import demonstration
from deploy.simulation.demonstration import draw_pair, present


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("rows", "present_classes", "names", "width"),
    [
        (400, 1, 3, 32),  # one class alone
        (13, 3, 3, 32),  # fewer records than dimensions
        (13, 3, 3, 1280),
        (2, 2, 2, 8),  # a record of each class
        (1, 1, 2, 8),
        (3, 3, 3, 8),
        (4, 3, 3, 8),
        (50, 3, 3, 1),  # one dimension
        (20, 2, 5, 2),  # classes of the list that nobody has
        (100, 30, 40, 16),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_draw_pair_draws_what_is_there(
    tmp_path: Path, rows: int, present_classes: int, names: int, width: int, rng: np.random.Generator
) -> None:
    real = rng.standard_normal((rows, width)).astype(np.float32), np.arange(rows) % present_classes
    made = rng.standard_normal((64, width)).astype(np.float32), rng.integers(0, names, 64)
    path = draw_pair(tmp_path / "p.png", real, made, tuple(f"c{number}" for number in range(names)))
    with Image.open(path) as picture:
        assert picture.size == (1320, 638)


def test_map_shows_classes_that_differ_in_a_direction_of_little_variance(rng: np.random.Generator) -> None:
    """Three classes along one direction of a tenth of the others' spread: neighbours on the map are of one class."""
    labels = np.arange(300) % 3
    values = (rng.standard_normal((300, 4)) * [5.0, 5.0, 5.0, 0.1]).astype(np.float32)
    values[:, 3] += labels
    head = fit_linear_head(torch.from_numpy(values), torch.from_numpy(labels), num_classes=3)
    points = demonstration.class_map(head, values)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(300, np.inf))
    assert (labels[gaps.argmin(axis=1)] == labels).mean() > 0.9


def test_present_says_what_a_run_made_without_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary: dict[str, Any] = {
        "config": RunConfig.from_flat({"pool": "nowhere.parquet"}).to_flat(),
        "scores": {},
        "privacy": {
            "epsilon_spent_per_site": {"site-1": 1.5}, "epsilon_target": 3.0, "delta": 1e-5, "neighbouring": "add",
            "unit": "record", "end_to_end": True, "data_is_public": False,
        },
        "synthetic_rows": 12,
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    present(tmp_path, tmp_path)  # neither pool nor synthetic set is there to be drawn
    told = capsys.readouterr().out
    assert "epsilon spent 1.50 of 3" in told
    assert "12 synthetic embeddings" in told
    assert "no picture: it could not be drawn (" in told
