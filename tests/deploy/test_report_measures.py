"""What the site's page measures, on sets whose answer is known."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deploy.report.draw import natural, plane, together
from deploy.report.fidelity import fidelity_by_class, fidelity_grid, nearest_synthetic, telling_rows
from deploy.report.project import class_plane, has_umap, main_components, umap_points

CENTRES = torch.tensor([[4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]])


def rows(count: int, seed: int, shift: float = 0.0, centres: Tensor = CENTRES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return centres[labels] + shift + 0.3 * torch.randn(count, 4, generator=generator), labels


def test_fidelity_of_the_same_law_is_as_good_as_own_records() -> None:
    found = fidelity_by_class(rows(180, 1), rows(90, 2), rows(600, 3), 3, torch.Generator().manual_seed(0))
    for one in found:
        assert (one.held_out, one.compared) == (30, 60)
        assert one.synthetic is not None
        assert one.own is not None
        assert one.synthetic.coverage > 0.8
        assert one.synthetic.precision > 0.8
        assert one.told_apart is not None
        assert 0.3 < one.told_apart < 0.7
        assert one.middle is not None
        assert one.middle > 0.99


def test_fidelity_of_a_set_elsewhere_is_none_and_is_told_apart() -> None:
    turned = rows(600, 3, centres=-CENTRES)
    found = fidelity_by_class(rows(180, 1), rows(90, 2), turned, 3, torch.Generator().manual_seed(0))
    for one in found:
        assert one.synthetic is not None
        assert (one.synthetic.coverage, one.synthetic.precision) == (0.0, 0.0)
        assert one.told_apart is not None
        assert one.told_apart > 0.95
        assert one.middle is not None
        assert one.middle < -0.95
        assert one.own_middle is not None
        assert one.own_middle > 0.99


def test_fidelity_of_few_rows_says_so() -> None:
    found = fidelity_by_class(rows(6, 1), rows(3, 2), rows(60, 3), 4, torch.Generator().manual_seed(0))
    grid = fidelity_grid(("a", "b", "c", "d"), found)
    assert grid.rows[0][4] == "too few"
    assert grid.rows[3][3:] == ("too few",) * 5  # a class that nobody has
    assert {len(row) for row in grid.rows} == {len(grid.columns)}


def test_nearest_synthetic_names_the_nearest_rows_of_each_record() -> None:
    own = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 0])
    made = torch.tensor([[0.0, 3.0], [0.0, 2.0], [9.0, 0.0], [0.5, 2.0]]), torch.tensor([0, 1, 1, 0])
    first, second = nearest_synthetic(torch.tensor([0, 1]), own, made)
    assert first.near == (1, 0, 0, 1)
    assert (first.distance, first.own_distance) == (2.0, 1.0)
    assert (second.near[0], second.distance, second.own_distance) == (1, 1.0, 10.0)
    assert first.words(("x", "y")) == "y ×2, x ×2"


def test_telling_rows_are_middling_ones_then_the_worst() -> None:
    own = torch.tensor([[0.0], [1.0], [2.0], [50.0], [9.0], [40.0]]), torch.tensor([0, 0, 0, 1, 1, 1])
    made = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    assert telling_rows(own, torch.tensor([0, 1, 2, 3, 4, 5]), made, 3, extremes=2) == [1, 5, 3, 4]
    assert telling_rows(own, torch.tensor([], dtype=torch.int64), made, 3) == []


def test_main_components_are_those_of_an_independent_decomposition() -> None:
    values = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    found = main_components(values)(values)
    left, scale, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    expected = left[:, :2] * scale[:2]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_class_plane_finds_classes_under_noise_that_hides_them_from_main_components() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(900) % 3
    values = rng.normal(size=(900, 40)).astype(np.float32)
    values[:, :5] *= 8.0  # noise that outweighs the classes
    values[:, 38] += 6.0 * (labels == 1)
    values[:, 39] += 6.0 * (labels == 2)

    def separation(points: np.ndarray) -> float:
        means = np.stack([points[labels == label].mean(axis=0) for label in range(3)])
        gaps = [np.linalg.norm(means[i] - means[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        return float(min(gaps) / np.mean([points[labels == label].std() for label in range(3)]))

    assert separation(class_plane(values, labels)(values)) > 1.5
    assert separation(main_components(values)(values)) < 0.5
    assert class_plane(values[:, :1], labels)(values[:, :1]).shape == (900, 2)


def test_has_umap_is_not_misled_by_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "umap" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    assert not has_umap()
    (tmp_path / "umap" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert has_umap()


@pytest.mark.slow
def test_umap_keeps_groups_together_and_gives_the_same_twice() -> None:
    if not has_umap():
        pytest.skip("umap-learn is not installed")
    values, labels = rows(90, 4)
    points = umap_points(values.numpy())
    assert points.shape == (90, 2)
    middles = np.stack([points[labels.numpy() == label].mean(axis=0) for label in range(3)])
    nearest = np.linalg.norm(points[:, None] - middles, axis=2).argmin(axis=1)
    assert (nearest == labels.numpy()).mean() > 0.95
    np.testing.assert_array_equal(points, umap_points(values.numpy()))


@pytest.mark.parametrize("count", [1, 2, 400])
def test_plane_draws_few_and_many_points(count: int) -> None:
    points = np.random.default_rng(0).normal(size=(count, 2))
    picture = plane(points, np.arange(count) % 3, ("a", "b", "c"), "title", "caption")
    assert picture.uri.startswith("data:image/png;base64,")
    assert picture.grid is not None
    assert sum(int(row[1]) for row in picture.grid.rows) == count


def test_names_are_sorted_by_number_and_shortened() -> None:
    assert sorted(["site-10", "site-2"], key=natural) == ["site-2", "site-10"]
    assert together(["a", "b", "c", "d"]) == "a and 3 more"
