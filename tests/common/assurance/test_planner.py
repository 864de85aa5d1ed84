"""The planner: its figures against the accountant, arithmetic by hand, and what noise really does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from common.assurance.expected_scores import simulate_noise, smallest_cohort
from common.assurance.plan import Cohort, plan_run
from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods.plans import private_plan
from common.privacy.composition import epsilon_pld
from common.records import SiteData

COHORT = Cohort(sites=4, records=100, dim=8, num_classes=3)


def make_config(**settings: Any) -> RunConfig:
    return RunConfig().replace(
        **{
            "epsilon": 2.0,
            "num_rounds": 4,
            "sampling_rate": 1.0,
            "encoder_width": 8,
            "sleep_steps": 1,
            "synthetic_rows": 200,
            "meta_steps": 2,
            **settings,
        }
    )


def public_records(count: int, seed: int) -> SiteData:
    centres = 2.0 * torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return SiteData(centres[labels] + 0.3 * torch.randn(count, 8, generator=generator), labels)


def test_plan_run_states_the_epsilon_of_its_events() -> None:
    config = make_config()
    found = plan_run(config, COHORT)
    assert found.plan == private_plan(config.replace(num_sites=4))
    assert found.epsilons[-1].pld == epsilon_pld(found.plan.all_events, config.privacy.delta)
    assert found.epsilons[-1].pld <= 2.0
    growing = [point.pld for point in found.epsilons]
    assert growing == sorted(growing)
    assert all(point.pld <= point.prv <= point.pld + 0.02 and point.pld <= point.rdp for point in found.epsilons)
    assert [point.label for point in found.epsilons] == [
        "statistics",
        "round 1",
        "round 2",
        "round 4",
        "1 repeated rounds",
    ]


def test_plan_run_noise_and_signal_by_hand() -> None:
    config = make_config(clip_norm=0.5, sampling_rate=0.25)
    found = plan_run(config, COHORT)
    one, every = found.levels[1], found.levels[2]
    # four sites, each with the whole noise: sigma C sqrt(4); 400 units, a quarter of them, of norm C over p coordinates
    assert one.noise_std == pytest.approx(found.plan.training_noise * 0.5 * 2.0)
    assert one.signal_rms == pytest.approx(0.25 * 400 * 0.5 / math.sqrt(one.coordinates))
    assert every.ratio == pytest.approx(one.ratio * math.sqrt(4))


def test_plan_run_bytes_are_those_of_the_messages() -> None:
    """Four bytes a number: the sums of four rounds and the statistics (counts, class sums, sum) up."""
    found = plan_run(make_config(), COHORT)
    statistics = 3 + 3 * 8 + 8
    assert found.bytes_up == 4 * (4 * found.levels[1].coordinates + statistics)
    assert found.levels[0].coordinates == statistics


def test_plan_run_ratio_falls_with_more_sites_of_the_same_total() -> None:
    """Under local trust each site adds its own noise: the same records in more sites give a noisier sum."""
    few = plan_run(make_config(), Cohort(2, 200, 8, 3)).levels[1].ratio
    many = plan_run(make_config(), Cohort(8, 50, 8, 3)).levels[1].ratio
    assert few == pytest.approx(2.0 * many)


def test_plan_run_shares_the_noise_under_secagg() -> None:
    """Ten sites, one missing and one colluding: the noise of the sum falls by the square root of eight."""
    alone = plan_run(make_config(), Cohort(10, 50, 8, 3)).levels
    shared = plan_run(make_config(trust="secagg", num_sites=10), Cohort(10, 50, 8, 3)).levels
    for one, other in zip(alone, shared, strict=True):
        assert one.noise_std == pytest.approx(other.noise_std * math.sqrt(8.0))


@pytest.mark.parametrize("settings", [{"epsilon": math.inf}, {"method": "fedavg"}])
def test_plan_run_refuses_a_run_without_protection(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="private method and a finite epsilon"):
        plan_run(make_config(**settings), COHORT)


@pytest.mark.parametrize("sizes", [(0, 10, 8, 3), (2, 0, 8, 3), (2, 10, 0, 3), (2, 10, 8, 1)])
def test_cohort_refuses_sizes_below_the_least(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        Cohort(*sizes)


def test_simulate_noise_loses_score_to_noise_and_nothing_in_a_large_cohort() -> None:
    train, test = public_records(120, 2), public_records(200, 3)
    config = make_config(epsilon=1.0)
    large = simulate_noise(config, Cohort(4, 100_000, 8, 3), train, test, seeds=(0, 1))
    small = simulate_noise(config, Cohort(4, 3, 8, 3), train, test, seeds=(0, 1))
    assert large.synthetic.balanced_accuracy > 0.9
    assert large.synthetic.balanced_accuracy == pytest.approx(large.noiseless.balanced_accuracy, abs=0.05)
    assert small.synthetic.balanced_accuracy < large.synthetic.balanced_accuracy - 0.2
    assert small.noiseless == large.noiseless
    assert large.local.balanced_accuracy > 0.9


def test_simulate_noise_repeats_itself_for_the_same_seeds() -> None:
    train, test = public_records(60, 2), public_records(60, 3)
    first, second = (simulate_noise(make_config(), COHORT, train, test, seeds=(5,)) for _ in range(2))
    assert first == second


def test_simulate_noise_refuses_a_method_without_samples() -> None:
    train = public_records(30, 2)
    with pytest.raises(ConfigError, match="publishes a head"):
        simulate_noise(make_config(method="dp_fedsgd"), COHORT, train, train, seeds=(0,))


def test_smallest_cohort_brackets_what_is_enough() -> None:
    train, test = public_records(120, 2), public_records(200, 3)
    config = make_config(epsilon=1.0)
    least = smallest_cohort(config, Cohort(4, 64, 8, 3), train, test, wanted=0.8)
    assert least is not None
    assert 1 < least < 4096
    assert smallest_cohort(config, Cohort(4, 64, 8, 3), train, test, wanted=1.01) is None
