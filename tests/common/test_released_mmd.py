"""The MMD against released features, end to end: release, what the sites receive, loss."""

from __future__ import annotations

import torch

from common.config.run import RunConfig
from common.generator.mmd import data_free_term, public_frequencies, unpack_target
from common.methods.base import PrivacyPlan, Problem, RunContext
from common.methods.constants import CENTRE, TARGET
from common.methods.fedhypevae.rates import generator_shape
from common.methods.fedhypevae.server import METHOD
from common.privacy.combined import combine_statistics
from common.privacy.noise import TestNoise
from common.privacy.statistics import release_statistics
from common.records import UnitBatch


def test_released_mmd_is_least_where_the_generator_is_right() -> None:
    """The release is of embeddings as they are, and the generator's rows lie around the centre."""
    sizes = {"num-sites": 1, "min-sites": 1, "latent-dim": 0, "code-dim": 0}
    config = RunConfig.from_flat({**sizes, "mmd": "released", "mmd-weight": 1.0})
    context = RunContext(config, Problem(4, ("a", "b"), 1), PrivacyPlan(0.0, 0.0, 1.0, 1, 2, 1e-5))
    noise = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(torch.tensor([3.0, 1.0, 0.0, 0.0]) + 0.3 * noise, dim=1)
    batch = UnitBatch(rows[:, None], (torch.arange(400) % 2)[:, None], torch.ones(400, 1))
    spec = METHOD.statistics(context)
    assert spec is not None
    released = combine_statistics(spec, [release_statistics(spec, batch, 0.0, TestNoise(0))], 0.0)
    state, shape = METHOD.prepare(context, METHOD.init(context), released), generator_shape(context)
    target = unpack_target(state.params[TARGET], public_frequencies(4, config.federation.seed), state.params[CENTRE])

    def loss(shift: float) -> float:
        moved = {**state.params, f"{shape.output_layer}.base_bias": shift * released.centre}
        return float(data_free_term(shape, moved, None, target, torch.Generator().manual_seed(1), 400))

    losses = {shift: loss(shift) for shift in (-0.5, 0.0, 0.5, 1.0)}
    assert min(losses, key=lambda shift: losses[shift]) == 0.0
