"""Statistics of many sites that a few can't move far: trimmed means by hand, a liar's reach, when they are refused."""

from __future__ import annotations

import pytest
import torch

from common.config.run import RunConfig
from common.errors import ConfigError
from common.privacy.combined import combine_statistics
from common.privacy.noise import TestNoise
from common.privacy.robust import settled, trimmed_mean, trimmed_sums
from common.privacy.sampling import draw_units
from common.privacy.statistics import StatisticsSpec, release_statistics
from common.records import SiteData, by_unit

DIM, CLASSES = 6, 3
SPEC = StatisticsSpec(DIM, CLASSES, 1.0, moment_weight=0.5)
CENTRES = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(3)), dim=1)


def release(seed: int, records: int = 200, turn: int = 0, noise: float = 0.05) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (records,), generator=draws)
    rows = 0.9 * CENTRES[labels] + 0.05 * torch.randn(records, DIM, generator=draws)
    units = by_unit(SiteData(rows, (labels + turn) % CLASSES), "record", CLASSES)
    return release_statistics(SPEC, draw_units(units, 1.0, 1, TestNoise(seed)), noise, TestNoise(seed))


def test_trimmed_mean_by_hand() -> None:
    values, equal = torch.tensor([[100.0], [1.0], [2.0], [-50.0]]), torch.ones(4, 1)
    assert trimmed_mean(values, equal).item() == pytest.approx(1.5)
    heavy = torch.tensor([[1.0], [8.0], [1.0], [0.0]])  # 1 has most of the weight: half of it is in the middle
    assert trimmed_mean(values, heavy).item() == pytest.approx(1.0)
    assert trimmed_mean(values, torch.zeros(4, 1)).item() == 0.0


def test_trimmed_statistics_of_honest_sites_are_close_to_the_plain_ones() -> None:
    releases = [release(seed, 100 + 40 * seed) for seed in range(7)]
    plain = combine_statistics(SPEC, releases, 0.05)
    robust = combine_statistics(SPEC, trimmed_sums(releases), 0.05)
    assert plain.class_means is not None
    assert robust.class_means is not None
    assert torch.allclose(plain.class_means, robust.class_means, atol=0.02)
    assert torch.allclose(plain.centre, robust.centre, atol=0.03)
    assert torch.allclose(plain.class_shares, robust.class_shares, atol=0.03)


@pytest.mark.parametrize("factor", [1.0, 50.0])
def test_one_liar_of_seven_moves_no_class_mean_far(factor: float) -> None:
    honest = [release(seed) for seed in range(6)]
    lie = {name: factor * value for name, value in release(9, turn=1, noise=0.0).items()}
    truth = combine_statistics(SPEC, honest, 0.05).class_means
    moved = {}
    for name, releases in (("off", [*honest, lie]), ("trimmed", trimmed_sums([*honest, lie]))):
        means = combine_statistics(SPEC, releases, 0.05).class_means
        assert means is not None
        assert truth is not None
        moved[name] = float((means - truth).norm(dim=1).max())
    assert moved["trimmed"] < 0.1
    assert moved["off"] > (0.1 if factor == 1.0 else 0.8)


def test_setting_decides_and_needs_enough_sites_that_show_their_own() -> None:
    releases = [release(seed) for seed in range(5)]
    assert settled("off", releases) is releases
    robust = RunConfig().replace(num_sites=5, robust_statistics="trimmed")
    assert len(list(settled(robust.federation.robust_statistics, releases))) == 5
    with pytest.raises(ConfigError, match="at least 5 sites"):
        RunConfig().replace(num_sites=4, robust_statistics="trimmed")
    with pytest.raises(ConfigError, match="only their sum"):
        RunConfig().replace(num_sites=6, robust_statistics="trimmed", trust="secagg")
