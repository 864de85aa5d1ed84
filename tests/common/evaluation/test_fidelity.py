"""Fidelity measures against textbook sums, closed forms and independent libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from common.evaluation.fidelity import (
    FidelityConfig,
    chunked_mmd2,
    fidelity,
    frechet_distance,
    two_sample_accuracy,
)
from common.evaluation.nonlinear_heads import MLPConfig

BANDWIDTHS = (0.5, 2.0)


def _sets(seed: int, real: int = 17, synthetic: int = 11, width: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(real, width, generator=generator), torch.randn(synthetic, width, generator=generator) + 0.5


def _kernel(left: list[float], right: list[float]) -> float:
    return sum(math.exp(-(math.dist(left, right) ** 2) / (2 * width**2)) for width in BANDWIDTHS) / len(BANDWIDTHS)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_mmd2_is_the_textbook_double_sum(chunk: int) -> None:
    real, synthetic = _sets(0)
    x, y = real.double().tolist(), synthetic.double().tolist()
    n, m = len(x), len(y)
    cross = 2 * sum(_kernel(a, b) for a in x for b in y) / (n * m)
    biased = sum(_kernel(a, b) for a in x for b in x) / n**2 + sum(_kernel(a, b) for a in y for b in y) / m**2
    assert chunked_mmd2(real, synthetic, BANDWIDTHS, chunk=chunk) == pytest.approx(biased - cross, abs=1e-9)


def test_mmd2_is_zero_for_equal_sets() -> None:
    real, _ = _sets(1)
    assert chunked_mmd2(real, real, BANDWIDTHS) == pytest.approx(0.0, abs=1e-12)


def test_frechet_distance_agrees_with_a_matrix_square_root() -> None:
    real, synthetic = _sets(3, real=50, synthetic=40, width=4)
    synthetic = synthetic @ torch.randn(4, 4, generator=torch.Generator().manual_seed(4))
    first, second = np.cov(real.double().numpy().T), np.cov(synthetic.double().numpy().T)
    shift = real.double().numpy().mean(0) - synthetic.double().numpy().mean(0)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = float(shift @ shift + np.trace(first + second - 2 * root))
    assert frechet_distance(real, synthetic) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_a_shift_and_of_fewer_rows_than_dimensions() -> None:
    real, _ = _sets(5, real=6, width=10)
    shift = torch.arange(10.0)
    assert frechet_distance(real, real + shift) == pytest.approx(float(shift.square().sum()), rel=1e-5)
    # Doubling about the mean: tr(Σ + 4Σ − 2 · 2Σ) = tr Σ.
    doubled = 2 * (real - real.mean(0)) + real.mean(0)
    expected = float(torch.cov(real.double().T).trace())
    assert frechet_distance(real, doubled) == pytest.approx(expected, rel=1e-5)


def test_two_sample_accuracy_is_half_for_equal_laws_and_one_for_far_ones() -> None:
    generator = torch.Generator().manual_seed(6)
    real, alike = torch.randn(800, 4, generator=generator), torch.randn(600, 4, generator=generator)
    network = MLPConfig(width=16, epochs=5, min_steps=100)
    # 600 held-out rows of a fair coin: four standard errors are 0.082.
    assert abs(two_sample_accuracy(real, alike, generator, network) - 0.5) < 0.082
    assert two_sample_accuracy(real, alike + 10, generator, network) == 1.0


def test_two_sample_accuracy_sees_a_difference_in_spread_alone() -> None:
    generator = torch.Generator().manual_seed(7)
    real, wide = torch.randn(600, 4, generator=generator), 3 * torch.randn(600, 4, generator=generator)
    assert two_sample_accuracy(real, wide, generator, MLPConfig(width=32, epochs=20)) > 0.75


def test_fidelity_uses_at_most_max_rows_and_repeats() -> None:
    real, synthetic = _sets(8, real=300, synthetic=90)
    config = FidelityConfig(bandwidths=BANDWIDTHS, max_rows=100, two_sample=MLPConfig(width=8, epochs=1, min_steps=10))
    found = fidelity(real, synthetic, torch.Generator().manual_seed(9), config)
    assert (found.real_rows, found.synthetic_rows) == (100, 90)
    assert found == fidelity(real, synthetic, torch.Generator().manual_seed(9), config)
    assert found.manifold is not None
    assert found.two_sample is not None


def test_fidelity_leaves_out_what_too_few_rows_cannot_give() -> None:
    real, synthetic = _sets(10, real=3, synthetic=1)
    found = fidelity(real, synthetic, torch.Generator().manual_seed(11))
    assert (found.frechet, found.manifold, found.two_sample) == (None, None, None)
    assert math.isfinite(found.mmd2)


def test_fidelity_refuses_bad_input() -> None:
    real, synthetic = _sets(13)
    with pytest.raises(DataError, match="one width"):
        frechet_distance(real, synthetic[:, :2])
    with pytest.raises(DataError, match="at least 2 rows"):
        frechet_distance(real[:1], synthetic)
    with pytest.raises(ConfigError, match="bandwidths"):
        FidelityConfig(bandwidths=())
    with pytest.raises(ConfigError, match="max_rows"):
        FidelityConfig(neighbours=5, max_rows=6)
