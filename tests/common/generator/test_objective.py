"""Eqs. 5-7, the terms that read no record, against sums written out; how they join the clipped part to make Eq. 6."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.generator.cvae import sample_given_labels
from common.generator.hypernetwork import generate
from common.generator.mmd import FeatureTarget
from common.generator.objective import data_free_loss
from common.kernels import fourier_frequencies
from tests.common.privacy.clipping_cases import Case, make_case
from tests.kernel_cases import mmd2

OFF = {"code_penalty": 0.0}


def found(case: Case, target: FeatureTarget | None = None) -> float:
    generator = torch.Generator().manual_seed(1)
    return float(data_free_loss(case.shape, case.training, case.params, case.code, target, generator))


def synthetic_rows(case: Case, samples: int = 16) -> Tensor:
    """The rows that `data_free_loss` draws from the same seed, class after class."""
    hot = torch.eye(case.shape.num_classes).repeat_interleave(samples, 0)
    generated = generate(case.shape, case.params, case.code)
    return sample_given_labels(case.shape, generated, hot, torch.Generator().manual_seed(1))[1]


def test_code_norm_and_lipschitz_penalty_by_hand() -> None:
    case = make_case(code_penalty=0.01, lipschitz_penalty=0.5, lipschitz_bound=0.2)
    assert case.code is not None
    heads = [value for name, value in case.params.items() if name.endswith((".row_scale", ".bias_shift"))]
    heads += [case.params[name] for name in ("prior.trunk.weight", "prior.head.weight", "class_shift.weight")]
    norms = [max(math.sqrt(max(torch.linalg.eigvalsh(w.double().T @ w.double()).tolist())), 0.0) for w in heads]
    expected = 0.01 * sum(v * v for v in case.code.tolist()) + 0.5 * sum(max(0.0, norm - 0.2) ** 2 for norm in norms)
    assert found(case) == pytest.approx(expected, rel=1e-5)


def test_released_mmd_is_the_weighted_gap_between_mean_features() -> None:
    case = make_case(mmd="released", mmd_weight=0.7, **OFF)
    frequencies = fourier_frequencies(6, 8, [0.5, 1.0, 2.0], 0)
    means = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    weights, centre = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, -0.2, 0.0, 0.5, 0.1, -0.4])
    expected, rows = 0.0, synthetic_rows(case).view(3, 16, 6) + centre
    for k in range(3):
        features = [torch.zeros(8, dtype=torch.float64)]
        for row in rows[k]:
            angles = [float(frequency @ row) for frequency in frequencies]
            values = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
            features.append(torch.tensor(values, dtype=torch.float64) / 2.0)  # 4 frequencies: over their root
        gap = sum(features) / 16 - means[k]
        expected += 0.7 * float(weights[k]) * float(gap @ gap)
    assert found(case, FeatureTarget(frequencies, means, weights, centre)) == pytest.approx(expected, rel=1e-5)


def test_released_mmd_is_mmd2_of_the_kernel_that_the_features_estimate() -> None:
    """One class, and the exact mean features of known rows as the release: Eq. 6 up to the features' error."""
    case = make_case(mmd="released", mmd_weight=1.0, **OFF)
    frequencies = fourier_frequencies(6, 60_000, [0.5, 1.0, 2.0], 0)
    real, centre = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)) / 6**0.5, torch.full((6,), 0.2)
    angles = real @ frequencies.T
    mean = torch.cat([angles.cos(), angles.sin()], 1).mean(0) / math.sqrt(30_000)
    target = FeatureTarget(frequencies, mean.expand(3, -1), torch.tensor([1.0, 0.0, 0.0]), centre)
    rows = synthetic_rows(case)[:16] + centre
    assert found(case, target) == pytest.approx(float(mmd2(rows, real, [0.5, 1.0, 2.0])), abs=0.02)


def test_per_example_mmd_keeps_the_synthetic_double_sum_apart() -> None:
    case = make_case(mmd="per-example", mmd_weight=0.3, **OFF)
    rows = synthetic_rows(case).double()
    total = 0.0
    for x in rows:
        for y in rows:
            gap = float((x - y) @ (x - y))
            total += sum(math.exp(-gap / (2 * h * h)) for h in (0.5, 1.0, 2.0)) / 3
    assert found(case) == pytest.approx(0.3 * total / len(rows) ** 2, rel=1e-5)


def test_nothing_asked_for_is_zero() -> None:
    assert found(make_case(**OFF)) == 0.0
