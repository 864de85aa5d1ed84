"""Runs whose noise is shared, in the plain loop: the law of what comes out, and what must not be shared."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.config.run import RunConfig
from common.errors import ConfigError
from common.loop import problem_of, run_loop, run_statistics
from common.methods import get_method, method_names
from common.methods.base import PrivacyPlan, RunContext, StepInput
from common.methods.shared_sums import assumptions_of, check_shares_noise, statistics_arguments, training_arguments
from common.methods.site_release import noise_source, statistics_batch
from common.privacy.noise import TestNoise
from common.privacy.statistics import statistics_sum
from common.records import SiteData
from common.secagg.quantise import ROUNDING_MARGIN, add_up, decode, encode
from common.wire.received import check_received

TINY: dict[str, Any] = {
    "num_sites": 10,
    "num_rounds": 2,
    "epsilon": 3.0,
    "delta": 1e-4,
    "noise": "test",
    "encoder_width": 4,
    "meta_steps": 3,
    "sleep_steps": 2,
    "trust": "secagg",
    "code_dim": 2,
}


def sites(count: int = 10) -> list[SiteData]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(30) % 3
    return [SiteData(torch.randn(30, 16, generator=generator), labels) for _ in range(count)]


def context_of(config: RunConfig) -> RunContext:
    return RunContext(config, problem_of(sites(), "abc"), get_method(config.method).plan(config))


@pytest.mark.parametrize("name", [name for name in method_names() if get_method(name).shares_noise])
def test_method_runs_with_shared_noise(name: str) -> None:
    result = run_loop(RunConfig().replace(method=name, **TINY), sites(), "abc")
    assert result.state.round == result.context.plan.num_rounds
    assert all(bool(torch.isfinite(value).all()) for value in result.artifact.tensors.values())


def test_methods_whose_sites_train_on_what_they_send_are_refused() -> None:
    refused = [name for name in method_names() if not get_method(name).shares_noise]
    assert {"dp_cvae", "dp_cgan", "fedavg", "mh_pfedhn"} <= set(refused)
    for name in refused:
        config = RunConfig().replace(method=name, **{**TINY, "local_steps": 1})
        with pytest.raises(ConfigError, match="can't run under trust secagg"):
            check_shares_noise(get_method(name), RunContext(config, problem_of(sites(), "abc"), _PLAN))


_PLAN = PrivacyPlan(1.0, 1.0, 1.0, 1, 1, 1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"local_steps": 2}, "local-steps 1"),
        ({"encoder_training": "unprotected"}, "sleep or joint"),
        ({"epsilon": math.inf}, "finite epsilon"),
        ({"num_sites": 3, "min_sites": 2}, "at least 4 sites"),
        ({"dropouts": 5}, "at least 12 sites"),
        ({"colluders": 9}, "at least"),
    ],
)
def test_settings_that_secagg_cannot_protect_are_refused(changes: dict[str, Any], match: str) -> None:
    RunConfig().replace(**TINY)
    with pytest.raises(ConfigError, match=match):
        RunConfig().replace(**{**TINY, **changes})


def test_shared_noise_is_smaller_by_the_square_root_of_the_honest_sites() -> None:
    """What the server sees of a round on empty data: noise of sigma C sqrt(10 / 8), against sigma C sqrt(10)."""
    config = RunConfig().replace(**{**TINY, "code_dim": 0, "elbo_weight": 0.0, "latent_dim": 0})
    context, method = context_of(config), get_method(config.method)
    state = method.init(context)
    params = {**state.params, "constant.total": torch.tensor(300.0)}
    arguments = training_arguments(context, method, params)
    zero = {name: torch.zeros(shape) for name, shape in method.upload_shapes(context).items()}
    draws = []
    for seed in range(40):
        vectors = [encode(arguments, zero, TestNoise(100 * seed + site)) for site in range(10)]
        draws += [value.flatten() for value in decode(arguments, add_up(vectors, arguments.bits)).values()]
    found = float(torch.cat(draws).double().std())
    expected = (context.plan.training_noise or 0.0) * config.privacy.clip_norm * math.sqrt(10 / 8)
    assert found == pytest.approx(expected, rel=0.05)


def test_statistics_of_the_sum_have_the_shared_noise() -> None:
    config = RunConfig().replace(**TINY)
    shared = run_statistics(context_of(config), get_method("fedhypevae"), sites())
    local = run_statistics(context_of(config.replace(trust="local")), get_method("fedhypevae"), sites())
    assert shared is not None
    assert local is not None
    ratio = local.noise_std["class_counts"] / shared.noise_std["class_counts"]
    assert ratio == pytest.approx(math.sqrt(8))
    exact = run_statistics(
        replace(context_of(config.replace(trust="local")), plan=replace(_PLAN, statistics_noise=1e-3)),
        get_method("fedhypevae"),
        sites(),
    )
    assert exact is not None
    error = (shared.centre - exact.centre).norm() / (local.centre - exact.centre).norm()
    assert float(error) < 1.0


@pytest.mark.parametrize("mode", ["sleep", "joint"])
def test_what_stays_at_the_site_keeps_its_whole_noise(mode: str) -> None:
    """Code (and encoder, under joint) of a site without records move by noise of sigma C, whatever is shared."""
    config = RunConfig().replace(
        **{**TINY, "encoder_training": mode, "code_radius": 1e4, "code_penalty": 0.0, "code_dim": 200}
    )
    context, method = context_of(config), get_method("fedhypevae")
    state = method.init(context)
    params = {**state.params, "constant.total": torch.tensor(300.0)}
    site = method.init_site(context, 0)
    empty = SiteData(torch.zeros(0, 16), torch.zeros(0, dtype=torch.long))
    found = {}
    for later in (False, True):
        work = StepInput(params, site, empty, 0, 0, noise_source(config, 0, 0), noised_later=later)
        after, sent = method.client_step(context, work)
        scale = config.privacy.clip_norm * config.privacy.sampling_rate * 300.0 / 10
        moved = {name: (after.tensors[name] - site.tensors[name]) * scale for name in site.tensors}
        noise = {
            "code": float(moved["code"].double().std()) / config.training.code_rate,
            "encoder": float(moved["encoder.0.weight"].double().std()) if mode == "joint" else 0.0,
            "sent": max(float(value.abs().max()) for value in sent.values()),
        }
        found[later] = noise
    wanted = (context.plan.training_noise or 0.0) * config.privacy.clip_norm * (1 + ROUNDING_MARGIN)
    for later in (False, True):
        assert found[later]["code"] == pytest.approx(wanted, rel=0.25)
        if mode == "joint":
            assert found[later]["encoder"] == pytest.approx(wanted * config.training.encoder_rate, rel=0.25)
    assert found[False]["sent"] > 0.0
    assert found[True]["sent"] == 0.0  # without records there is nothing to send but the noise that comes later


def test_what_is_added_without_records_leaves_the_sums_as_fine_as_they_were() -> None:
    """Parameters at which the Lipschitz penalty adds far more to a sum than records do: it gets its noise only after.

    Each step of a float32 of this size is as long as the whole contribution of a record.
    """
    config = RunConfig().replace(
        **{**TINY, "elbo_weight": 0.0, "lipschitz_penalty": 1.0, "code_dim": 8, "trunk_width": 64}
    )
    context, method = context_of(config), get_method("fedhypevae")
    state, site = method.init(context), method.init_site(context, 0)
    shift = state.params["class_shift.weight"]
    params = {
        **state.params,
        "constant.total": torch.tensor(1e7),
        "constant.class_offsets": torch.zeros(3),
        # features of plus and minus one, so that a record moves all numbers of a row by the same
        "trunk.weight": 1e3 * state.params["trunk.weight"] / state.params["trunk.weight"].norm(),
        "class_shift.weight": torch.full_like(shift, 4.0 / math.sqrt(shift.numel())),
    }
    check_received(context, method, 0, {name: params[name] for name in method.received_by(context, 0)})
    data, arguments = sites(1)[0], training_arguments(context, method, params)

    def sent(count: int) -> dict[str, torch.Tensor]:
        held = SiteData(data.embeddings[:count], torch.zeros(count, dtype=torch.long))
        work = StepInput(params, site, held, 0, 0, TestNoise(1), noised_later=True)
        return dict(method.client_step(context, work)[1])

    whole = [sent(count) for count in range(30)]
    largest = float(whole[0]["class_shift.weight"].abs().max())
    assert 1e6 * config.privacy.clip_norm < largest < arguments.limit * arguments.grid  # it is not cut off
    for less, more in pairwise(whole):
        gap = torch.cat([(more[name].double() - less[name]).flatten() for name in less])
        assert float(gap.norm()) <= config.privacy.clip_norm * (1 + 1e-5)


class _OneDeviation:
    """A source whose every normal number is one standard deviation: what is added tells how wide the noise is."""

    name, certified = "test", False

    def __init__(self) -> None:
        self._draws = TestNoise(1)

    def gaussian(self, shape: int | tuple[int, ...], std: float) -> NDArray[np.float64]:
        return np.full(shape, std)

    def uniform(self, size: int) -> NDArray[np.float64]:
        return self._draws.uniform(size)

    def exact_gaussian(self, values: NDArray[np.float64], std: float) -> NDArray[np.float64]:
        return values + std


@pytest.mark.parametrize("later", [False, True])
def test_what_stays_pays_for_the_rounding_of_what_is_sent(later: bool) -> None:
    """To the digit: 1 + 2^-10 times sigma C where the sums are rounded before their shared noise, else sigma C."""
    config = RunConfig().replace(**{**TINY, "code_radius": 1e4, "code_penalty": 0.0})
    context, method = context_of(config), get_method("fedhypevae")
    params = {**method.init(context).params, "constant.total": torch.tensor(300.0)}
    site = method.init_site(context, 0)
    empty = SiteData(torch.zeros(0, 16), torch.zeros(0, dtype=torch.long))
    work = StepInput(params, site, empty, 0, 0, _OneDeviation(), noised_later=later)
    after, _ = method.client_step(context, work)
    scale = config.privacy.clip_norm * config.privacy.sampling_rate * 300.0 / 10
    moved = (site.tensors["code"] - after.tensors["code"]).double() * scale / config.training.code_rate
    wanted = (context.plan.training_noise or 0.0) * config.privacy.clip_norm * (1 + 2**-10 if later else 1)
    # the code is kept in float32, beside numbers of order one
    torch.testing.assert_close(moved, torch.full_like(moved, wanted), rtol=1e-4, atol=0.0)


def test_statistics_of_the_sum_pay_for_their_whole_sensitivity() -> None:
    """To the digit, and held against units: one more of them moves the sum by as much as the noise is made for."""
    context = context_of(RunConfig().replace(**TINY))
    spec = get_method("fedhypevae").statistics(context)
    assert spec is not None
    made = statistics_arguments(context, spec)
    together = made.share_std * math.sqrt(assumptions_of(context).honest_shares) * made.grid
    assert together == pytest.approx((context.plan.statistics_noise or 0.0) * spec.sensitivity * (1 + 2**-10), rel=1e-9)
    far = SiteData(torch.full((1, 16), 1e3), torch.zeros(1, dtype=torch.long))
    moved = statistics_sum(spec, statistics_batch(context, far, TestNoise(1))).tensors
    length = math.sqrt(sum(float(value.double().square().sum()) for value in moved.values()))
    assert 0.75 * spec.sensitivity < length <= spec.sensitivity


def test_noise_that_comes_later_needs_single_steps() -> None:
    config = RunConfig().replace(**{**TINY, "trust": "local", "local_steps": 2})
    context, method = context_of(config), get_method("fedhypevae")
    state, site = method.init(context), method.init_site(context, 0)
    work = StepInput(state.params, site, sites(1)[0], 0, 0, TestNoise(1), noised_later=True)
    with pytest.raises(ConfigError, match="one local step"):
        method.client_step(context, work)
