"""Per-unit gradients from factors are autograd's gradients of batches of one, and torch.func's, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from common.generator.layers import PlainLayers, row_scaled_layer
from common.generator.objective import record_losses
from common.generator.tape import Tape
from tests.common.privacy.clipping_cases import (
    CASES,
    UnitDraws,
    flat,
    make_case,
    product_sum,
    record_factors,
    reference_gradient,
    reference_inputs,
    reference_loss,
)


@pytest.mark.parametrize("name", CASES)
def test_factors_give_the_gradients_of_batches_of_one(name: str) -> None:
    case = make_case(**CASES[name])
    for unit in range(case.mask.shape[0]):
        found = flat(product_sum(case, [unit], float("inf")).tensors)
        expected = flat(reference_gradient(case, unit))
        assert expected.norm() > 1e-3
        assert torch.allclose(found, expected, rtol=1e-4, atol=2e-6 * float(expected.norm().clamp(min=1)))


@pytest.mark.parametrize("name", CASES)
def test_factors_of_a_batch_add_up_to_autograd(name: str) -> None:
    case = make_case(units=7, **CASES[name])
    found = flat(product_sum(case, list(range(7)), float("inf")).tensors)
    expected = sum(flat(reference_gradient(case, unit)) for unit in range(7))
    assert torch.allclose(found, expected, rtol=1e-4, atol=2e-5)


def test_losses_are_the_equations_losses() -> None:
    for name, settings in CASES.items():
        case = make_case(**settings)
        units = list(range(5))
        tape = Tape({**case.params, **case.encoder}, case.code, 5)
        losses = record_losses(
            case.shape,
            case.training,
            tape,
            tape if case.joint else PlainLayers(case.encoder),
            case.embeddings,
            case.labels,
            case.mask,
            UnitDraws(units),
        )
        expected = [reference_loss(case, case.leaves, *reference_inputs(case, unit)) for unit in units]
        assert torch.allclose(losses, torch.stack(expected), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("name", ["default", "joint patients", "mmd", "hidden trunk joint patients"])
def test_factors_agree_with_torch_func_vmap(name: str) -> None:
    case = make_case(units=6, **CASES[name])
    inputs = [torch.stack(parts) for parts in zip(*(reference_inputs(case, u) for u in range(6)), strict=True)]
    per_unit = vmap(
        grad(lambda leaves, *rest: reference_loss(case, leaves, *rest)), in_dims=(None, *[0] * len(inputs))
    )(case.leaves, *inputs)
    for unit in range(6):
        found = product_sum(case, [unit], float("inf")).tensors
        for parameter, value in found.items():
            assert torch.allclose(value, per_unit[parameter][unit], rtol=1e-4, atol=1e-5), parameter


def test_row_scaled_layer_is_an_explicit_diagonal_times_the_matrix() -> None:
    case = make_case(trunk_width=4)
    features = torch.randn(4, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(2))
    name, params = "decoder.0", case.params
    scale = torch.diag(1 + params[f"{name}.row_scale"] @ features)
    bias = params[f"{name}.base_bias"] + params[f"{name}.bias_shift"] @ features
    _, _, out = row_scaled_layer(params, name, features, inputs)
    assert torch.allclose(out, inputs @ (scale @ params[f"{name}.base_weight"]).T + bias, atol=1e-6)


def test_row_scaled_layer_by_hand() -> None:
    # d = 1 + [2, 0] = [3, 1]; W a = [1*1+2*2, 3*1+4*2] = [5, 11]; b + shift = [1, 1]
    params = {
        "l.base_weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "l.base_bias": torch.tensor([1.0, 0.0]),
        "l.row_scale": torch.tensor([[2.0], [0.0]]),
        "l.bias_shift": torch.tensor([[0.0], [1.0]]),
    }
    _, _, out = row_scaled_layer(params, "l", torch.tensor([1.0]), torch.tensor([[[1.0, 2.0]]]))
    assert out.tolist() == [[[16.0, 12.0]]]


def test_frozen_layers_leave_no_factors() -> None:
    case = make_case()
    tape = Tape({**case.params, **case.encoder}, case.code, 5, frozen=("encoder.",))
    width = case.encoder["encoder.0.weight"].shape[1]
    out = tape.linear("encoder.0", torch.ones(5, 1, width))
    kept = tape.linear("prior.embedding", torch.ones(5, 1, 3))
    factors = tape.factors(kept.sum((1, 2)) + out.sum((1, 2)))
    assert set(factors.outer) == {"prior.embedding.weight"}


def test_a_unit_that_is_not_finite_leaves_the_others_factors_alone() -> None:
    clean = make_case(units=6)
    dirty = make_case(units=6)
    dirty.embeddings[2] = float("nan")
    dirty.embeddings[4] = float("inf")
    others = [0, 1, 3, 5]
    whole = record_factors(dirty, list(range(6)))
    for name, pairs in record_factors(clean, list(range(6))).outer.items():
        for (left, right), (found_left, found_right) in zip(pairs, whole.outer[name], strict=True):
            assert torch.equal(left[others], found_left[others]), name
            assert torch.equal(right[others], found_right[others]), name


@pytest.mark.parametrize("name", ["default", "patients", "trunk"])
def test_one_unit_more_leaves_the_others_bit_for_bit_where_there_are_few(name: str) -> None:
    """BLAS takes other ways for few rows: all scores change by a rounding then, and parameters can blow that up."""
    case = make_case(units=24, dim=96, encoder_width=48, **CASES[name])
    for units in range(2, 25):
        fewer, more = (record_factors(case, list(range(count))) for count in (units - 1, units))
        for key, pairs in fewer.outer.items():
            for sides, others in zip(pairs, more.outer[key], strict=True):
                for side, other in zip(sides, others, strict=True):
                    assert torch.equal(side, other[: units - 1]), (units, key)
        for key, (left, _) in fewer.shared.items():
            assert torch.equal(left, more.shared[key][0][: units - 1]), (units, key)
