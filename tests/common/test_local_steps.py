"""Several local steps in a round: each draws its own units and has noise of its own, and each is charged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import ConfigError
from common.generator.tape import Tape
from common.methods import get_method, method_names
from common.methods.base import Method, Problem, RunContext, StepInput
from common.methods.generators.dp_network import noised_gradient_sum
from common.methods.shared_sums import shared_statistics_noise
from common.methods.site_release import noise_source
from common.privacy.composition import epsilon_pld
from common.privacy.events import mechanism_counts
from common.privacy.noise import SecureNoise
from common.records import SiteData, UnitBatch

NOISE, CLIP, STEPS = 3.0, 0.25, 4
CLASSES = tuple("abc")


def context_of(name: str, dim: int = 40, **changes: Any) -> tuple[Method, RunContext]:
    settings: dict[str, Any] = {
        "num_sites": 1,
        "min_sites": 1,
        "clip_norm": CLIP,
        "local_steps": STEPS,
        "sleep_steps": 0,
        "code_penalty": 0.0,
        "public_total": 10,
        "statistics_share": 0.0,
    }
    config = RunConfig().replace(method=name, **{**settings, **changes})
    method = get_method(name)
    plan = replace(method.plan(config), training_noise=NOISE)
    return method, RunContext(config, Problem(dim, CLASSES, 1), plan)


def records(count: int, dim: int = 40) -> SiteData:
    generator = torch.Generator().manual_seed(0)
    return SiteData(torch.randn(count, dim, generator=generator), torch.arange(count) % 3)


def sent(method: Method, context: RunContext, source: SecureNoise, round_index: int = 0) -> Tensor:
    """What a site without records sends in a round: noise alone."""
    state, site = method.init(context), method.init_site(context, 0)
    _, uploads = method.client_step(
        context, StepInput(state.params, site, records(0, context.problem.dim), round_index, 0, source)
    )
    return torch.cat([uploads[name].double().flatten() for name in sorted(uploads)])


@pytest.mark.parametrize(
    "name", [name for name in method_names() if get_method(name).private and get_method(name).name != "dp_gauss"]
)
@pytest.mark.parametrize("trust", ["local", "secagg"])
def test_step_without_planned_noise_is_refused(name: str, trust: str) -> None:
    """`None` is not 0: a plan that says 0 is run without noise, one that says nothing is not run."""
    method, context = context_of(name, local_steps=1)
    state, site = method.init(context), method.init_site(context, 0)
    received = state.params if method.broadcast is None else method.broadcast(context, state, 0)
    work = StepInput(received, site, records(6), 0, 0, SecureNoise(), noised_later=trust == "secagg")
    method.client_step(replace(context, plan=replace(context.plan, training_noise=0.0)), work)
    with pytest.raises(ConfigError, match="names no noise multiplier"):
        method.client_step(replace(context, plan=replace(context.plan, training_noise=None)), work)


def test_shared_statistics_without_planned_noise_are_refused() -> None:
    _, context = context_of("fedhypevae", num_sites=4, trust="secagg", local_steps=1)
    context = replace(context, problem=replace(context.problem, num_sites=4))
    assert shared_statistics_noise(replace(context, plan=replace(context.plan, statistics_noise=0.0))) == 0.0
    with pytest.raises(ConfigError, match="names no noise multiplier"):
        shared_statistics_noise(replace(context, plan=replace(context.plan, statistics_noise=None)))


@pytest.mark.parametrize("mode", ["sleep", "joint"])
def test_each_local_step_has_noise_of_its_own(mode: str) -> None:
    """The sum over T steps has variance T (σC)²; one noise for all, or the same seed in each, would give T² (σC)²."""
    method, context = context_of("fedhypevae", dim=400, encoder_training=mode)
    rounds = [sent(method, context, SecureNoise(), number) for number in (0, 0, 1)]
    error = 6.0 / math.sqrt(2.0 * rounds[0].numel())
    for upload in rounds:
        assert float(upload.square().mean()) / (STEPS * (NOISE * CLIP) ** 2) == pytest.approx(1.0, abs=2 * error)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(torch.stack([rounds[one], rounds[other]]))[0, 1])) < 2 * error


@pytest.mark.parametrize("units", [0, 6])
def test_noise_of_a_networks_step_is_the_multiplier_times_the_clip_norm(units: int) -> None:
    """However many units were drawn, none included: N(0, (σC)²), in each step another."""
    _, context = context_of("dp_cvae")
    params = {"layer.weight": torch.zeros(100, 200), "layer.bias": torch.zeros(100)}
    batch = UnitBatch(torch.zeros(units, 1, 200), torch.zeros(units, 1, dtype=torch.long), torch.ones(units, 1))

    def losses(tape: Tape, some: UnitBatch, _: object) -> Tensor:
        return 0.0 * tape.linear("layer", some.embeddings).sum((1, 2))

    source = SecureNoise()
    first, second = (noised_gradient_sum(context, params, batch, losses, source) for _ in range(2))
    drawn = [torch.cat([step[name].double().flatten() for name in params]) for step in (first, second)]
    error = 6.0 / math.sqrt(2.0 * drawn[0].numel())
    for step in drawn:
        assert float(step.square().mean()) / (NOISE * CLIP) ** 2 == pytest.approx(1.0, abs=2 * error)
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 2 * error


class Counting(SecureNoise):
    """Secret numbers, with a note of how many uniform ones were asked for at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def uniform(self, size: int) -> np.ndarray:
        self.asked.append(size)
        return super().uniform(size)


@pytest.mark.parametrize("name", ["fedhypevae", "dp_fedsgd", "dp_cvae", "dp_cgan"])
def test_every_local_step_of_every_round_draws_its_own_units(name: str) -> None:
    """One secret number for each unit in each step, in the first round and in later ones."""
    method, context = context_of(name, sampling_rate=0.5)
    state, site = method.init(context), method.init_site(context, 0)
    for number in range(3):
        source = Counting()
        method.client_step(context, StepInput(state.params, site, records(31), number, 0, source))
        assert source.asked.count(31) == STEPS


@pytest.mark.parametrize("round_index", [-2, -1, 0, 1, 7])
def test_the_runs_seed_never_reaches_the_noise(round_index: int) -> None:
    """Two sources of the same run, site and round: what one draws says nothing of the other, in any kind of draw."""
    config = RunConfig().replace(seed=5, noise="secure")
    one, other = (noise_source(config, 0, round_index) for _ in range(2))
    assert one.certified
    assert other.certified
    assert not np.intersect1d(one.gaussian(1000, 1.0), other.gaussian(1000, 1.0)).size
    assert not np.intersect1d(one.uniform(1000), other.uniform(1000)).size
    apart = one.exact_gaussian(np.zeros(200), 1.0), other.exact_gaussian(np.zeros(200), 1.0)
    assert not np.intersect1d(*apart).size


@pytest.mark.parametrize("name", [name for name in method_names() if get_method(name).private])
def test_plan_declares_everything_that_is_released(name: str) -> None:
    """Statistics once, every local step of every round and of the spare ones; together ε, and not much less."""
    several = name != "mh_pfedhn_gd_dp"
    steps, rate = (3, 0.4) if several else (1, 1.0)
    config = RunConfig().replace(
        method=name, local_steps=steps, sampling_rate=rate, num_rounds=4, spare_rounds=2, epsilon=2.0, delta=1e-5
    )
    plan = get_method(name).plan(config)
    counts = {(sigma, sampled): count for sigma, sampled, count in mechanism_counts(plan.all_events)}
    assert plan.statistics_noise is not None
    wanted = {(plan.statistics_noise, 1.0): 1}
    if plan.training_noise is not None:
        wanted[plan.training_noise, rate] = 6 * steps
        assert [event.count for event in plan.round_events] == [steps]
    assert counts == wanted
    assert sum(event.count for event in plan.statistics_events) == 1
    assert 0.97 * 2.0 <= epsilon_pld(plan.all_events, 1e-5) <= 2.0
