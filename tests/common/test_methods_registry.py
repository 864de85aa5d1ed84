"""Every method, by name: three rounds, what is sent is what is declared, and what is charged keeps the promise."""

from __future__ import annotations

import math

import pytest
import torch

from common.config.run import RunConfig
from common.errors import ConfigError
from common.loop import run_loop
from common.methods import get_method, method_names
from common.methods.base import StepInput
from common.methods.site_release import noise_source
from common.privacy.composition import epsilon_pld
from common.records import SiteData
from tests.row_cases import rows_of

_TINY = {
    "num_sites": 3,
    "num_rounds": 3,
    "epsilon": 2.0,
    "delta": 1e-4,
    "noise": "test",
    "cvae_width": 5,
    "noise_dim": 3,
    "gan_width": 4,
    "encoder_width": 4,
    "meta_steps": 3,
    "sleep_steps": 2,
    "chunk_size": 25,
    "body_width": 6,
}


def _sites() -> list[SiteData]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(12) % 3
    return [SiteData(torch.randn(12, 6, generator=generator), labels) for _ in range(3)]


@pytest.mark.parametrize("name", method_names())
def test_method_runs_three_rounds_and_sends_what_it_declares(name: str) -> None:
    method, sites = get_method(name), _sites()
    result = run_loop(RunConfig().replace(method=name, **_TINY), sites, ["a", "b", "c"])
    context = result.context
    assert method.name == name
    assert result.state.round == context.plan.num_rounds
    assert all(bool(torch.isfinite(value).all()) for value in result.artifact.tensors.values())
    for site, data in enumerate(sites):
        params = method.params_for(context, result.state, site)
        work = StepInput(params, result.sites[site], data, 0, site, noise_source(context.config, site, 0))
        sent = method.client_step(context, work)[1]
        assert {key: tuple(value.shape) for key, value in sent.items()} == dict(method.shapes_from(context, site))
        assert all(value.dtype == torch.float32 for value in sent.values())
    if method.law is not None:
        rows, labels = rows_of(method.law(context, result.artifact), torch.arange(6) % 3)
        assert (rows.shape, labels.shape) == ((6, 6), (6,))
        assert bool(torch.isfinite(rows).all())


@pytest.mark.parametrize("name", method_names())
def test_private_plans_keep_epsilon_and_others_promise_nothing(name: str) -> None:
    method = get_method(name)
    plan = method.plan(RunConfig().replace(method=name, **_TINY))
    spent = epsilon_pld(plan.all_events, plan.delta)
    if method.private:
        assert 1.9 < spent <= 2.0
    else:
        assert math.isinf(spent)


def test_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="expected one of fedhypevae"):
        get_method("fedsomething")
