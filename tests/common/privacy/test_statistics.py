"""Statistics by hand, patients included, and what the server makes of them."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import ConfigError
from common.privacy.combined import combine_statistics
from common.privacy.noise import TestNoise
from common.privacy.sampling import draw_units
from common.privacy.statistics import (
    StatisticsSpec,
    pack_symmetric,
    release_statistics,
    statistics_sum,
    unpack_symmetric,
)
from common.records import SiteData, UnitBatch


def _batch() -> UnitBatch:
    data = SiteData(torch.tensor([[3.0, 4.0], [0.3, 0.0], [0.0, 0.5]]), torch.tensor([0, 1, 1]))
    return draw_units(data, 1.0, 1, TestNoise(0))


def test_statistics_by_hand() -> None:
    spec = StatisticsSpec(2, 2, 1.0, moment_weight=1.0)
    assert spec.sensitivity == pytest.approx(math.sqrt(0.09 + 1 + 1 + 1))
    released = release_statistics(spec, _batch(), 0.0, TestNoise(0))
    # the first record is clipped to norm 1: (0.6, 0.8)
    assert torch.allclose(released["class_counts"], torch.tensor([1.0, 2.0]))
    assert torch.allclose(released["class_sums"], torch.tensor([[0.6, 0.8], [0.3, 0.5]]))
    assert torch.allclose(released["total_sum"], torch.tensor([0.9, 1.3]))
    moment = unpack_symmetric(released["second_moment"], 2)
    assert torch.allclose(moment, torch.tensor([[0.45, 0.48], [0.48, 0.89]]), atol=1e-6)
    combined = combine_statistics(spec, [released, released], 0.0)
    assert combined.total == pytest.approx(6.0)
    assert torch.allclose(combined.centre, torch.tensor([0.3, 1.3 / 3]))
    assert torch.allclose(combined.class_means, torch.tensor([[0.6, 0.8], [0.15, 0.25]]))
    assert torch.allclose(combined.class_offsets, combined.class_means - combined.centre)  # no noise: nothing shrunk


def test_a_patients_records_are_clipped_together() -> None:
    spec = StatisticsSpec(2, 2, 1.0)
    data = SiteData(torch.tensor([[1.0, 0.0]] * 4), torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    summed = statistics_sum(spec, draw_units(data, 1.0, 4, TestNoise(0)))
    assert float(summed.tensors["class_counts"][0]) == pytest.approx(0.3)  # four records count as one
    total = math.sqrt(sum(float(value.square().sum()) for value in summed.tensors.values()))
    assert total == pytest.approx(spec.sensitivity)


def test_noise_of_a_release_is_the_multiplier_times_the_sensitivity() -> None:
    spec = StatisticsSpec(300, 40, 1.0, count_weight=0.5)
    empty = UnitBatch(torch.zeros(0, 1, 300), torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1))
    released = release_statistics(spec, empty, 2.0, TestNoise(0))
    assert float(released["class_sums"].std()) == pytest.approx(2.0 * spec.sensitivity, rel=0.03)
    for name, weight in (("class_counts", 0.5), ("total_sum", 1.0)):  # fewer numbers, and each part has its noise
        assert float(released[name].std()) == pytest.approx(2.0 * spec.sensitivity / weight, rel=0.6)
    assert combine_statistics(spec, [released] * 4, 2.0).noise_std["class_counts"] == pytest.approx(
        2.0 * spec.sensitivity / 0.5 * 2.0
    )


def _released(spec: StatisticsSpec, counts: list[float], **sums: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"class_counts": torch.tensor(counts), **sums}


def test_the_centre_is_shrunk_by_the_noise_in_it() -> None:
    spec = StatisticsSpec(4, 2, 1.0, count_weight=1.0, class_weight=0.0)  # S = sqrt(2)
    release = _released(spec, [60.0, 40.0], total_sum=torch.tensor([30.0, 0.0, 40.0, 0.0]))
    # mean (.3, 0, .4, 0), |.|^2 = .25; noise 4 (σ S / 100)^2 = .08 at σ = 10: kept 1 - .32
    centre = combine_statistics(spec, [release], 10.0).centre
    assert torch.allclose(centre, 0.68 * torch.tensor([0.3, 0.0, 0.4, 0.0]))
    assert torch.equal(combine_statistics(spec, [release], 100.0).centre, torch.zeros(4))  # nothing but noise


def test_a_centre_of_class_sums_alone_has_the_noise_of_all_classes() -> None:
    spec = StatisticsSpec(4, 2, 1.0, count_weight=1.0, total_weight=0.0)
    sums = torch.tensor([[30.0, 0.0, 0.0, 0.0], [0.0, 0.0, 40.0, 0.0]])
    release = _released(spec, [60.0, 40.0], class_sums=sums)
    centre = combine_statistics(spec, [release], 5.0).centre  # 2 classes x 4 (5 sqrt(2) / 100)^2 = .04 of .25
    assert torch.allclose(centre, 0.84 * torch.tensor([0.3, 0.0, 0.4, 0.0]))


def test_class_shares_are_shrunk_towards_equal_ones() -> None:
    spec = StatisticsSpec(1, 2, 1.0, count_weight=1.0, class_weight=0.0, total_weight=0.0)
    release = _released(spec, [70.0, 30.0])
    # deviations (20, -20), squares 800; noise 2 x 10^2: kept 3/4
    assert torch.allclose(combine_statistics(spec, [release], 10.0).class_shares, torch.tensor([0.65, 0.35]))
    assert torch.allclose(combine_statistics(spec, [release], 30.0).class_shares, torch.tensor([0.5, 0.5]))
    assert torch.allclose(combine_statistics(spec, [release], 0.0).class_shares, torch.tensor([0.7, 0.3]))


def test_packing_is_an_isometry() -> None:
    matrix = torch.tensor([[1.0, 2.0], [2.0, 5.0]])
    assert float(pack_symmetric(matrix).norm()) == pytest.approx(float(matrix.norm()))
    assert torch.allclose(unpack_symmetric(pack_symmetric(matrix), 2), matrix)


def test_statistics_of_no_site_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one site"):
        combine_statistics(StatisticsSpec(2, 2, 1.0), [], 1.0)
