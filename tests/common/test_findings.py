"""Findings in a method's step: what is unknown has a gradient of exactly zero, and sums are those of single units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import ConfigError
from common.findings import label_losses, residuals
from common.loop import problem_of, run_loop
from common.methods import get_method, method_names
from common.methods.base import RunContext, StepInput
from common.methods.constants import TOTAL
from common.methods.published import draw_published
from common.privacy.noise import TestNoise
from common.records import SiteData, cumulative

NAMES = ("a", "b", "c")
WITHOUT = {"dp_cgan"}


def site(count: int, seed: int, dim: int = 8, grades: bool = False) -> SiteData:
    """Records whose findings move them along axes of their own; a tenth of the findings unknown."""
    draws = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, 3, generator=draws) < torch.tensor([0.4, 0.3, 0.2])).to(torch.int8)
    if grades:
        labels = cumulative(torch.randint(4, (count,), generator=draws), 4)
    embeddings = 0.3 + labels.float() @ torch.eye(3, dim) + 0.15 * torch.randn(count, dim, generator=draws)
    if not grades:
        labels[torch.rand(count, 3, generator=draws) < 0.1] = -1
    return SiteData(embeddings, labels, torch.arange(count) // 2)


def config(method: str, **settings: Any) -> RunConfig:
    flat = {
        "method": method,
        "task": "multilabel",
        "noise": "test",
        "num-sites": 2,
        "num-rounds": 2,
        "public-total": 40,
        "synthetic-rows": 50,
        **settings,
    }
    return RunConfig.from_flat(flat)


def test_an_unknown_finding_has_no_part_in_loss_and_gradient() -> None:
    scores = torch.tensor([[2.0, -1.0, 0.5]], requires_grad=True)
    labels = torch.tensor([[1, -1, 0]], dtype=torch.int8)
    loss = label_losses(scores, labels)
    by_hand = torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(0.5)))
    assert float(loss.detach()) == pytest.approx(float(by_hand))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert float(gradient[0, 1]) == 0.0
    assert torch.allclose(gradient, residuals(scores.detach(), labels))
    classes = torch.tensor([2])
    (of_class,) = torch.autograd.grad(label_losses(scores, classes).sum(), scores)
    assert torch.allclose(of_class, residuals(scores.detach(), classes))


def _step(method: str, data: SiteData, source: TestNoise, **settings: object) -> dict[str, Tensor]:
    """What a site without noise sends in one round, from parameters that are not at their start."""
    chosen = config(method, epsilon=float("inf"), **settings)
    context = RunContext(chosen, problem_of([data, data], NAMES, "multilabel"), get_method(method).plan(chosen))
    state = get_method(method).init(context)
    draws = torch.Generator().manual_seed(5)
    params = {
        name: value + 0.1 * torch.randn(value.shape, generator=draws) for name, value in sorted(state.params.items())
    }
    params[TOTAL] = torch.tensor(20.0)
    work = StepInput(params, get_method(method).init_site(context, 0), data, 0, 0, source)
    return get_method(method).client_step(context, work)[1]


@pytest.mark.parametrize("unit", ["record", "patient"])
@pytest.mark.parametrize("method", ["dp_fedsgd", "fedhypevae"])
def test_masked_gradients_of_a_batch_are_those_of_its_units_one_by_one(method: str, unit: str) -> None:
    data, settings = site(12, 1), {"unit": unit, "encoder-training": "joint", "clip-norm": 0.05}
    whole = _step(method, data, TestNoise(3), **settings)
    source = TestNoise(3)  # each unit draws the numbers that it has in the batch
    groups = data.groups if unit == "patient" else torch.arange(12)
    assert groups is not None
    summed = {name: torch.zeros_like(value) for name, value in whole.items()}
    empty = _step(method, _some(data, torch.zeros(12, dtype=torch.bool)), source, **settings)
    for group in groups.unique():
        alone = _step(method, _some(data, groups == group), source, **settings)
        # what no record is read for is in each sum once
        summed = {name: value + alone[name] - empty[name] for name, value in summed.items()}
    for name, value in whole.items():
        assert torch.allclose(value, summed[name] + empty[name], atol=1e-5), name


def _some(data: SiteData, rows: Tensor) -> SiteData:
    assert data.groups is not None
    return SiteData(data.embeddings[rows], data.labels[rows], data.groups[rows])


@pytest.mark.parametrize("method", ["dp_fedsgd", "fedhypevae"])
def test_columns_of_a_finding_that_nobody_knows_are_not_moved(method: str) -> None:
    data = site(12, 2)
    labels = data.labels.clone()
    labels[:, 1] = -1
    sent = _step(method, replace(data, labels=labels), TestNoise(0), **{"clip-norm": 0.05})
    none = _step(method, _some(data, torch.zeros(12, dtype=torch.bool)), TestNoise(0), **{"clip-norm": 0.05})
    column = next(name for name in sent if name.endswith(".class_weight"))
    assert torch.equal(sent[column][:, 1], none[column][:, 1])
    assert torch.equal(sent["class_bias.weight"][1], none["class_bias.weight"][1])
    assert not torch.equal(sent[column][:, 0], none[column][:, 0])


def test_a_record_with_a_finding_of_no_value_adds_nothing() -> None:
    data = site(12, 3)
    labels = data.labels.clone()
    labels[4, 2], labels[5, 0] = 7, -128
    keep = torch.ones(12, dtype=torch.bool)
    keep[4:6] = False
    settings = {"unit": "record", "clip-norm": 0.05, "elbo-weight": 0.0, "latent-dim": 0, "code-dim": 0}
    sent = _step("fedhypevae", replace(data, labels=labels), TestNoise(0), **settings)
    without = _step("fedhypevae", _some(data, keep), TestNoise(0), **settings)
    assert all(torch.allclose(sent[name], without[name], atol=1e-6) for name in sent)


@pytest.mark.parametrize("task", ["multilabel", "ordinal"])
@pytest.mark.parametrize("method", sorted(set(method_names()) - WITHOUT))
def test_every_method_learns_findings_or_grades(method: str, task: str) -> None:
    sites = [site(20, seed, grades=task == "ordinal") for seed in (4, 5)]
    names = NAMES if task == "multilabel" else ("none", "mild", "moderate", "severe")
    result = run_loop(config(method, task=task), sites, names)
    assert all(bool(value.isfinite().all()) for value in result.artifact.tensors.values())
    drawn = draw_published(result.context, result.artifact)
    if drawn is None:
        return
    rows, labels = drawn
    assert rows.shape == (50, 8)
    if task == "multilabel":
        assert labels.dtype == torch.int8
        assert labels.shape == (50, 3)
        assert set(labels.unique().tolist()) <= {0, 1}
    else:
        assert labels.dtype == torch.int64
        assert labels.shape == (50,)
        assert 0 <= int(labels.min()) <= int(labels.max()) <= 3


@pytest.mark.parametrize("method", sorted(WITHOUT))
def test_a_method_of_classes_alone_refuses_findings_in_one_line(method: str) -> None:
    with pytest.raises(ConfigError, match="needs one class a record") as caught:
        run_loop(config(method), [site(8, 6), site(8, 7)], NAMES)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"mmd": "released", "mmd-weight": 0.1}, {"covariance-weight": 1.0}, {"robust-statistics": "trimmed"}]
)
def test_settings_for_classes_refuse_findings(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="needs one class a record"):
        config("fedhypevae", **{"num-sites": 5, **settings})
