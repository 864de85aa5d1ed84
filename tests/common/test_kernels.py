"""Kernels and MMD against the textbook sums, and Fourier features against the kernel."""

from __future__ import annotations

import math

import pytest
import torch

from common.kernels import fourier_features, fourier_frequencies, gaussian_kernel
from tests.kernel_cases import mmd2


def _points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gaussian_kernel_by_hand() -> None:
    left, right = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    # |x - y|^2 = 25; bandwidths 5 and 10: mean of e^(-1/2) and e^(-1/8)
    expected = (math.exp(-0.5) + math.exp(-0.125)) / 2
    assert float(gaussian_kernel(left, right, [5.0, 10.0])) == pytest.approx(expected, rel=1e-6)


def test_mmd2_is_the_textbook_double_sum() -> None:
    left, right, widths = _points(5, 0), _points(7, 1) + 0.5, (0.5, 2.0)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return sum(math.exp(-float(((x - y) ** 2).sum()) / (2 * h * h)) for h in widths) / len(widths)

    expected = (
        sum(kernel(x, y) for x in left for y in left) / 25
        + sum(kernel(x, y) for x in right for y in right) / 49
        - 2 * sum(kernel(x, y) for x in left for y in right) / 35
    )
    assert float(mmd2(left, right, widths)) == pytest.approx(expected, rel=1e-9)


def test_mmd2_of_a_set_with_itself_is_zero_and_of_others_above() -> None:
    points = _points(20, 0)
    assert abs(float(mmd2(points, points, [1.0]))) < 1e-12
    assert float(mmd2(points, points + 1, [1.0])) > 0.1


def test_fourier_features_estimate_the_kernel_and_have_norm_one() -> None:
    points = _points(6, 2)
    features = fourier_features(points, fourier_frequencies(3, 60_000, [0.5, 1.0, 2.0], 0).double())
    assert torch.allclose(features.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(features @ features.T, gaussian_kernel(points, points, [0.5, 1.0, 2.0]), atol=0.03)
