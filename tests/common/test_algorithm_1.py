"""The fast round is the paper's Algorithm 1: the same Φ, codes and encoders as a slow reference of it."""

from __future__ import annotations

import pytest
import torch

from common.config.run import RunConfig
from common.loop import run_loop
from common.records import SiteData
from tests.common.algorithm_1 import algorithm_1

SETTINGS = {
    "num-sites": 2,
    "min-sites": 2,
    "num-rounds": 3,
    "noise": "test",
    "public-total": 9,
    "statistics-share": 0.0,
    "score-noise": 0.0,
    "momentum": 0.0,
    "averaging-fraction": 0.0,
    "elbo-weight": 0.5,
    "clip-norm": 0.3,
    "learning-rate": 2.0,
}
# A norm from Gram matrices is up to 1e-4 too long (`clipping.py`), and a clipped contribution that much shorter.
CLOSE = {"atol": 1e-6, "rtol": 2e-4}
SHAPES = ({}, {"hidden-widths": "5", "trunk-width": 3})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [1.0, 1e6])
def test_fast_round_is_algorithm_1(shape: dict[str, str | int], epsilon: float) -> None:
    """With noise that hides the records, and with so little that every record's gradient counts."""
    numbers = torch.Generator().manual_seed(0)
    sites = [SiteData(torch.randn(n, 6, generator=numbers), torch.arange(n) % 3) for n in (5, 4)]
    config = RunConfig.from_flat({**SETTINGS, **shape, "epsilon": epsilon})
    fast = run_loop(config, sites, ("a", "b", "c"))
    phi, kept = algorithm_1(fast.context, sites)
    for name, value in phi.items():
        torch.testing.assert_close(fast.state.params[name], value, **CLOSE)
    for site, tensors in zip(fast.sites, kept, strict=True):
        assert site.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(site.tensors[name], value, **CLOSE)
