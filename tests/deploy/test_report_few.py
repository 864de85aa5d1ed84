"""Figures of the reports from very few or very many rows and classes."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.report import draw
from deploy.report.project import class_plane, main_components


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (1, 1), (2, 8), (3, 1), (5, 8)])
@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.filterwarnings("error")
def test_projections_take_few_rows(rows: int, width: int, classes: int, rng: np.random.Generator) -> None:
    values = rng.standard_normal((rows, width)).astype(np.float32)
    assert main_components(values)(values).shape == (rows, 2)
    points = class_plane(values, np.arange(rows) % classes)(values)
    assert points.shape == (rows, 2)
    assert np.isfinite(points).all()


def test_figures_of_thousands_of_classes_stay_of_a_size(rng: np.random.Generator) -> None:
    names = [f"class {number}" for number in range(2000)]
    plane = draw.plane(rng.standard_normal((2000, 2)), np.arange(2000), names, "t", "c")
    assert plane.size == (460, 400)
    dots = draw.agreement(dict.fromkeys(names, (0.5, None)), "t", "c")
    assert dots.size[1] < 2_000
    assert "The first 60 of 2000 are shown." in dots.caption
