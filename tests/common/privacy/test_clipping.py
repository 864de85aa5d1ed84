"""Clipped sums: against a loop of batches of one, against Opacus, and by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from common.errors import ConfigError
from common.generator import objective
from common.privacy.clipping import FACTOR_BOUND, clipped_gradient_sum, clipped_vector_sum, unit_squared_norms
from common.privacy.factors import GradientFactors
from common.privacy.noise import TestNoise
from common.records import UnitBatch
from tests.common.privacy.clipping_cases import (
    CASES,
    Case,
    UnitDraws,
    flat,
    make_case,
    product_sum,
    record_factors,
    reference_gradient,
    summing,
)


@pytest.fixture(autouse=True, params=["processor", "gpu"])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here holds for both ways of summing."""
    with summing(request.param):
        yield request.param


def loop_of_one(case: Case, units: list[int], clip_norm: float) -> Tensor:
    """Abadi et al. (2016) as printed: one unit at a time, its whole gradient clipped, added up."""
    total = torch.zeros(sum(shape.numel() for shape in case.shapes.values()), dtype=torch.float64)
    for unit in units:
        gradient = flat(reference_gradient(case, unit))
        total += gradient / max(1.0, float(gradient.norm()) / clip_norm)
    return total


@pytest.mark.parametrize("clip_norm", [1e-3, 0.4, 1e3])
@pytest.mark.parametrize("name", CASES)
def test_clipped_sum_is_a_loop_of_batches_of_one(name: str, clip_norm: float) -> None:
    case = make_case(units=6, **CASES[name])
    found = flat(product_sum(case, list(range(6)), clip_norm).tensors)
    expected = loop_of_one(case, list(range(6)), clip_norm)
    # a patient's norm carries a safety margin of at most 1e-4 of the largest it could be
    assert float((found - expected).norm()) <= 2e-4 * float(expected.norm()) + 1e-6


def test_clipped_sum_by_hand() -> None:
    # unit 0: outer gradient [3] x [1, 0] and vector [4]: norm 5; unit 1: [0] x [1, 0] and [0.5]: norm 0.5; C = 1
    factors = GradientFactors()
    factors.add_outer("w", torch.tensor([[[3.0]], [[0.0]]]), torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))
    factors.add_vector("b", torch.tensor([[4.0], [0.5]]))
    squared = unit_squared_norms(factors)
    assert squared is not None
    assert squared.tolist() == [25.0, 0.25]
    summed = clipped_gradient_sum(factors, {"w": (1, 2), "b": (1,), "absent": (2,)}, 1.0)
    assert torch.allclose(summed.tensors["w"], torch.tensor([[0.6, 0.0]]))
    assert torch.allclose(summed.tensors["b"], torch.tensor([0.8 + 0.5]))
    assert summed.tensors["absent"].tolist() == [0.0, 0.0]
    assert summed.sensitivity == 1.0
    assert summed.neighbouring == "add or remove one unit"


def test_infinite_clip_norm_is_the_plain_gradient() -> None:
    case = make_case(units=6)
    expected = sum(flat(reference_gradient(case, unit)) for unit in range(6))
    assert torch.allclose(flat(product_sum(case, list(range(6)), math.inf).tensors), expected, atol=1e-5)


def test_no_units_give_a_zero_sum_of_full_shape() -> None:
    case = make_case()
    summed = product_sum(case, [], 0.5)
    assert {name: value.shape for name, value in summed.tensors.items()} == case.shapes
    assert float(flat(summed.tensors).abs().sum()) == 0.0
    assert summed.sensitivity == 0.5


def test_zero_gradient_is_not_divided_by_zero() -> None:
    factors = GradientFactors(vectors={"b": [torch.zeros(2, 3)]})
    assert clipped_gradient_sum(factors, {"b": (3,)}, 1.0).tensors["b"].tolist() == [0.0, 0.0, 0.0]


def test_units_that_are_not_finite_contribute_zero() -> None:
    case, dirty = make_case(units=6), make_case(units=6)
    dirty.embeddings[1], dirty.embeddings[3] = math.nan, math.inf
    found = flat(product_sum(dirty, list(range(6)), 0.1).tensors)
    assert torch.allclose(found, flat(product_sum(case, [0, 2, 4, 5], 0.1).tensors), atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2 * FACTOR_BOUND])
def test_a_factor_of_all_units_that_is_not_finite_leaves_zeros(bad: float) -> None:
    factors = GradientFactors(vectors={"b": [torch.ones(3, 2)]})
    factors.add_shared("w", torch.ones(3, 2), torch.tensor([1.0, bad]))
    summed = clipped_gradient_sum(factors, {"w": (2, 2), "b": (2,)}, 1.0)
    assert flat(summed.tensors).tolist() == [0.0] * 6


def test_both_ways_of_summing_agree() -> None:
    """Several pairs of factors of one parameter, and several rows of a unit, among units that contribute nothing."""
    generator = torch.Generator().manual_seed(0)
    factors = GradientFactors()
    for _ in range(2):
        factors.add_outer("w", *(torch.randn(9, 1, width, generator=generator) for width in (4, 3)))
    factors.add_outer("v", *(torch.randn(9, 3, width, generator=generator) for width in (1, 5)))
    factors.add_vector("b", torch.randn(9, 4, generator=generator))
    factors.add_shared("s", torch.randn(9, 4, generator=generator), torch.randn(2, generator=generator))
    factors.vectors["b"][0][2] = math.nan
    shapes = {"w": (4, 3), "v": (1, 5), "b": (4,), "s": (4, 2)}
    found = []
    for place in ("processor", "gpu"):
        with summing(place):
            found.append((unit_squared_norms(factors), flat(clipped_gradient_sum(factors, shapes, 2.0).tensors)))
    (norms, one), (other_norms, other) = found
    torch.testing.assert_close(other_norms, norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_a_unit_with_a_factor_beyond_the_public_bound_contributes_zero() -> None:
    # unit 0 has the longest factor that is allowed beside a tiny one, unit 1 one that is longer: both gradients are 1
    left = torch.tensor([[[FACTOR_BOUND]], [[1.01 * FACTOR_BOUND]]])
    factors = GradientFactors({"w": [(left, 1 / left)]})
    assert unit_squared_norms(factors).tolist() == pytest.approx([1.0, math.inf])
    clipped = clipped_gradient_sum(factors, {"w": (1, 1)}, 10.0).tensors["w"]
    assert float(clipped) == pytest.approx(1.0)


def test_nearly_cancelling_records_of_a_patient_stay_within_the_clip_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    for gap in (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.135, 0.14, 0.15, 0.2):
        left = 1e4 * torch.randn(8, 1, 30, generator=generator)
        right = torch.randn(8, 1, 30, generator=generator)
        factors = GradientFactors()
        factors.add_outer("w", torch.cat([left, -left * (1 + gap)], 1), right.expand(-1, 2, -1))
        for unit in range(8):
            one = GradientFactors({"w": [(p[0][unit : unit + 1], p[1][unit : unit + 1]) for p in factors.outer["w"]]})
            clipped = clipped_gradient_sum(one, {"w": (30, 30)}, 0.03).tensors["w"]
            assert float(clipped.double().norm()) <= 0.03


def test_clip_norm_below_what_float32_can_hold_contributions_to_is_refused() -> None:
    for bad in (0.0, -1.0, math.nan, 9.9e-7):
        with pytest.raises(ConfigError, match="clip norm must be at least 1e-06, found"):
            clipped_gradient_sum(GradientFactors(), {}, bad)
        with pytest.raises(ConfigError, match="clip norm must be at least 1e-06, found"):
            clipped_vector_sum(torch.ones(1, 1), bad)


def test_gradient_outside_the_declared_vector_is_refused() -> None:
    factors = GradientFactors(vectors={"encoder.0.bias": [torch.ones(1, 3)]})
    with pytest.raises(ConfigError, match=r"gradient of unknown parameter encoder\.0\.bias"):
        clipped_gradient_sum(factors, {"code": (3,)}, 1.0)


def test_clipped_vector_sum_by_hand() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [math.nan, 1.0], [math.inf, 0.0]])
    summed = clipped_vector_sum(rows, 1.0)
    assert torch.allclose(summed.tensors["sum"], torch.tensor([0.9, 1.2], dtype=torch.float64))
    assert summed.sensitivity == 1.0


class ElboModule(nn.Module):
    """The generator's ELBO as an nn.Module that Opacus understands: Linear and Embedding layers only.

    The encoder is given (it is not trained on records): its mean, log scale and latent come as inputs.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        p, self.case = case.params, case
        assert case.code is not None

        def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            layer.weight.data.copy_(weight)
            if bias is not None:
                layer.bias.data.copy_(bias)
            return layer

        name = "decoder.0"
        self.code = nn.Embedding.from_pretrained(case.code[None].clone(), freeze=False)
        self.base = linear(p[f"{name}.base_weight"])
        self.classes = linear(p[f"{name}.class_weight"])
        self.scale = linear(p[f"{name}.row_scale"])
        self.shift = linear(p[f"{name}.bias_shift"], p[f"{name}.base_bias"])
        self.prior_trunk = linear(p["prior.trunk.weight"], p["prior.trunk.bias"])
        self.prior_embedding = linear(p["prior.embedding.weight"])
        self.prior_head = linear(p["prior.head.weight"], p["prior.head.bias"])

    names = (
        ("code.weight", "code"),
        ("base.weight", "decoder.0.base_weight"),
        ("classes.weight", "decoder.0.class_weight"),
        ("scale.weight", "decoder.0.row_scale"),
        ("shift.weight", "decoder.0.bias_shift"),
        ("shift.bias", "decoder.0.base_bias"),
        ("prior_trunk.weight", "prior.trunk.weight"),
        ("prior_trunk.bias", "prior.trunk.bias"),
        ("prior_embedding.weight", "prior.embedding.weight"),
        ("prior_head.weight", "prior.head.weight"),
        ("prior_head.bias", "prior.head.bias"),
    )

    def forward(self, x: Tensor, hot: Tensor, mean: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
        """Losses, (B, 1)."""
        shape, weight = self.case.shape, self.case.training.elbo_weight
        code = self.code(torch.zeros(x.shape[0], dtype=torch.long))
        latent = mean + torch.exp(log_scale) * noise
        inner = self.base(latent) + shape.observation_variance * self.classes(hot)
        decoded = (1 + self.scale(code)) * inner + self.shift(code)
        head = self.prior_head(torch.cat([torch.tanh(self.prior_trunk(code)), self.prior_embedding(hot)], -1))
        prior_mean, raw = head.chunk(2, -1)
        prior = torch.distributions.Normal(prior_mean, torch.exp(2 * torch.tanh(raw / 2)))
        divergence = torch.distributions.kl_divergence(torch.distributions.Normal(mean, torch.exp(log_scale)), prior)
        law = torch.distributions.Normal(decoded, shape.observation_variance**0.5)
        elbo = law.log_prob(x).sum(-1) - divergence.sum(-1)
        return (-weight / shape.dim * elbo)[:, None]


def opacus_sum(case: Case, clip_norm: float, mode: str) -> dict[str, Tensor]:
    """The clipped sum by Opacus: its per-example hooks, or its ghost clipping with two backward passes."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    from common.generator.cvae import encode
    from common.generator.layers import PlainLayers

    x, labels, units = case.embeddings[:, 0], case.labels[:, 0], case.labels.shape[0]
    hot = torch.nn.functional.one_hot(labels, case.shape.num_classes).float()
    mean, log_scale = encode(case.shape, PlainLayers(case.encoder), x, hot)
    noise = torch.from_numpy(UnitDraws(list(range(units))).gaussian((units, 1, 2), 1.0))[:, 0].float()
    module = ElboModule(case)
    inputs = (x, hot, mean.detach(), log_scale.detach(), noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mode == "hooks":
            wrapped = GradSampleModule(module, batch_first=True, loss_reduction="sum")
            wrapped(*inputs).sum().backward()
            samples = dict(wrapped.named_parameters())
            norm = sum(p.grad_sample.flatten(1).square().sum(1) for p in samples.values()).sqrt()
            factor = (clip_norm / norm).clamp(max=1.0)
            grads = {n: torch.einsum("b,b...->...", factor, p.grad_sample) for n, p in samples.items()}
        else:
            wrapped = GradSampleModuleFastGradientClipping(
                module,
                batch_first=True,
                loss_reduction="sum",
                max_grad_norm=clip_norm,
                use_ghost_clipping=True,
            )
            losses = wrapped(*inputs)[:, 0]
            losses.sum().backward(retain_graph=True)
            factor = wrapped.get_clipping_coef().detach()
            for parameter in wrapped.parameters():
                parameter.grad = None
            wrapped.disable_hooks()
            (factor * losses).sum().backward()
            grads = {n: p.grad for n, p in wrapped.named_parameters()}
    found = {ours: grads[f"_module.{theirs}"] for theirs, ours in ElboModule.names}
    return {name: value[0] if name == "code" else value for name, value in found.items()}


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_clipped_sum_agrees_with_opacus(mode: str) -> None:
    case = make_case(units=12, discriminative_weight=0.0)
    norms = unit_squared_norms(record_factors(case, list(range(12))))
    assert norms is not None
    clip_norm = float(norms.sqrt().median())  # half of the units are clipped
    found = product_sum(case, list(range(12)), clip_norm).tensors
    for name, value in opacus_sum(case, clip_norm, mode).items():
        assert torch.allclose(value, found[name], rtol=2e-4, atol=2e-5), name


@pytest.mark.parametrize("rows", [1, 3])
def test_tiles_of_units_give_the_sum_of_one_part(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same draws, same clipped units, whatever the size of a tile; each unit lies whole in one tile."""
    case = make_case(units=10, rows=rows, trunk_width=3, hidden_widths="4")
    batch = UnitBatch(case.embeddings, case.labels, case.mask)

    def parts(tile: int) -> list[GradientFactors]:
        monkeypatch.setattr(objective, "_TILE", tile)
        sizes = (case.shape, case.training, case.params, case.code, case.encoder, batch)
        return list(objective.record_factors(*sizes, TestNoise(3)))

    whole, tiles = parts(2**18), parts(3 * rows * case.shape.dim)
    assert (len(whole), len(tiles)) == (1, 4)
    norms = torch.cat([unit_squared_norms(part) for part in tiles])
    torch.testing.assert_close(norms, unit_squared_norms(whole[0]), rtol=1e-5, atol=0)
    one = clipped_gradient_sum(whole, case.shapes, 0.05)
    several = clipped_gradient_sum(iter(tiles), case.shapes, 0.05)
    assert several.sensitivity == 0.05
    for name, value in one.tensors.items():
        found = several.tensors[name]
        torch.testing.assert_close(found.float(), value, rtol=1e-4, atol=1e-6)


def test_parts_are_each_held_against_the_vector() -> None:
    parts = [GradientFactors(vectors={"b": [torch.ones(1, 3)]}), GradientFactors(vectors={"c": [torch.ones(1, 3)]})]
    with pytest.raises(ConfigError, match="unknown parameter c"):
        clipped_gradient_sum(parts, {"b": (3,)}, 1.0)


def test_one_unit_of_many_moves_the_sum_by_the_clip_norm_and_little_rounding() -> None:
    """All point one way, so that the sum of the others is as long as it can be, and its rounding as well."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(1, 1, 8, generator=generator) + 1e-3 * torch.randn(100_000, 1, 8, generator=generator)
        for _ in range(2)
    )

    def summed(start: int) -> torch.Tensor:
        factors = GradientFactors({"w": [(left[start:], right[start:])]}, {"b": [left[start:, 0]]})
        return flat(clipped_gradient_sum(factors, {"w": (8, 8), "b": (8,)}, 0.03).tensors)

    moved = [float((summed(start) - summed(start + 1)).norm()) for start in range(5)]
    assert max(moved) <= 0.03 * (1 + 1e-3)


def test_parts_that_cancel_in_each_unit_round_the_sum_over_units_little() -> None:
    """A layer that is called twice: either call's sum over all units is long, and what is left of them is not."""
    generator = torch.Generator().manual_seed(0)
    left, right = (1e3 * torch.rand(4096, 1, 1, generator=generator) for _ in range(2))

    def summed(start: int) -> torch.Tensor:
        factors = GradientFactors({"w": [(left[start:], right[start:]), (-left[start:], right[start:])]})
        return flat(clipped_gradient_sum(factors, {"w": (1, 1)}, 1.0).tensors)

    moved = [float((summed(start) - summed(start + 1)).norm()) for start in range(20)]
    assert max(moved) <= 0.03  # each unit's gradient is zero
