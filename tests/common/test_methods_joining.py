"""A site that joins after training: its code alone is fitted, and its samples come nearer to its records."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from common.config.run import RunConfig
from common.errors import ConfigError, DataError
from common.loop import LoopResult, run_loop
from common.methods.fedhypevae.joining import fit_code, sample_personal
from common.records import SiteData, unit_length


def _site(shift: float, seed: int, rows: int = 60) -> SiteData:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    centres = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    offset = torch.tensor([0.0, 0.0, 0.0, shift])
    embeddings = 0.4 * centres[labels] + offset + 0.05 * torch.randn(rows, 4, generator=generator)
    return unit_length(SiteData(embeddings, labels))


def _trained(**changes: str | float | bool) -> LoopResult:
    settings: dict[str, str | float | bool] = {
        "num_sites": 3, "num_rounds": 5, "epsilon": math.inf, "noise": "test", "clip_norm": math.inf,
        "latent_dim": 0, "code_dim": 2, "elbo_weight": 1.0, "code_radius": 1.0,
    }  # fmt: skip
    sites = [_site(shift, at) for at, shift in enumerate((-0.3, 0.0, 0.3))]
    result = run_loop(RunConfig().replace(**{**settings, **changes}), sites, ["a", "b", "c"])
    if result.context.config.model.code_dim == 0:
        return result
    # A generator whose code does one thing: its first number moves embeddings along the last axis, by one half.
    shift = torch.zeros(4, 2)
    shift[3, 0] = 0.5
    tensors = {**result.artifact.tensors, "decoder.0.bias_shift": shift}
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("decoder.0.row_scale", "class_shift.weight")}
    return replace(result, artifact=replace(result.artifact, tensors=tensors))


def test_fit_code_finds_the_shift_of_a_new_site() -> None:
    result, newcomer = _trained(), _site(0.25, 9)
    before = {name: value.clone() for name, value in result.artifact.tensors.items()}
    code = fit_code(result.context, result.artifact, newcomer)
    assert all(torch.equal(before[name], value) for name, value in result.artifact.tensors.items())
    assert float(code.norm()) <= result.context.config.training.code_radius + 1e-6
    wanted = newcomer.labels.repeat(20)  # noise of 0.4 in a row must not decide
    neutral, _ = sample_personal(result.context, result.artifact, torch.zeros(2), wanted, 1)
    personal, _ = sample_personal(result.context, result.artifact, code, wanted, 1)
    gaps = [float((rows.mean(0) - newcomer.embeddings.mean(0))[3].abs()) for rows in (neutral, personal)]
    assert gaps[1] < 0.5 * gaps[0]


def test_fit_code_refuses_a_generator_without_one_and_a_site_without_records() -> None:
    result = _trained(code_dim=0)
    with pytest.raises(ConfigError, match="code-dim"):
        fit_code(result.context, result.artifact, _site(0.0, 1))
    result = _trained()
    with pytest.raises(DataError, match="at least one record"):
        fit_code(result.context, result.artifact, SiteData(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))
