"""Eqs. 2-5: an untrained hypernetwork changes nothing, explicit matrices, projections."""

from __future__ import annotations

import torch

from common.generator.hypernetwork import (
    decode,
    generate,
    hypernetwork_heads,
    init_code,
    init_hypernet_params,
    project_code,
    project_spectral_norms,
)
from common.generator.layers import PlainLayers
from common.generator.lipschitz import lipschitz_penalty
from common.generator.printed_rows import as_printed
from tests.common.privacy.clipping_cases import make_case


def test_untrained_hypernetwork_leaves_the_base_decoder_unchanged() -> None:
    for settings in ({}, {"hidden_widths": "4,3"}, {"trunk_width": 5}):
        shape = make_case(**settings).shape
        params = init_hypernet_params(shape, torch.Generator().manual_seed(0))
        latent, hot = (
            torch.randn(7, 2, generator=torch.Generator().manual_seed(1)),
            torch.eye(3)[[0, 1, 2, 0, 1, 2, 0]],
        )
        code = init_code(shape, 1.0, torch.Generator().manual_seed(2))
        base = decode(shape, PlainLayers(params), latent, hot)
        assert torch.equal(decode(shape, PlainLayers.at(params, code), latent, hot), base)
        assert float(base.abs().sum()) > 0


def test_generated_priors_depend_on_the_code_and_the_class() -> None:
    case = make_case()
    one, two = (
        generate(case.shape, case.params, case.code),
        generate(case.shape, case.params, 0.5 * case.code),
    )
    assert not torch.allclose(one.prior_mean, two.prior_mean)
    assert not torch.allclose(one.prior_mean[0], one.prior_mean[1])
    assert float(one.prior_log_scale.abs().max()) <= 2.0


def test_printed_rows_average_parameters_as_eq_13_prints_and_leave_out_the_priors_as_eq_12() -> None:
    case = make_case()
    codes, weights = (case.code, -2 * case.code), torch.tensor([0.25, 0.75])
    parts = [generate(case.shape, case.params, code) for code in codes]
    mixed = as_printed(parts, weights)
    scale = case.params["decoder.0.row_scale"]
    rows = 0.25 * (1 + scale @ codes[0]) + 0.75 * (1 + scale @ codes[1])
    assert torch.allclose(1 + scale @ mixed.layers.features, rows, atol=1e-6)
    assert not mixed.prior_mean.any()
    assert not mixed.prior_log_scale.any()  # of N(0, I)
    assert parts[0].prior_mean.any()


def test_projections_bound_norms_and_leave_what_is_inside() -> None:
    assert torch.allclose(project_code(torch.tensor([3.0, 4.0]), 1.0), torch.tensor([0.6, 0.8]))
    assert project_code(torch.tensor([0.3, 0.4]), 1.0).tolist() == torch.tensor([0.3, 0.4]).tolist()
    params = make_case(trunk_width=4).params
    projected = project_spectral_norms(params, 0.5)
    for name in params:
        if name in hypernetwork_heads(params):
            assert float(torch.linalg.svdvals(projected[name])[0]) <= 0.5 * (1 + 1e-5)
        else:
            assert torch.equal(projected[name], params[name])
    assert abs(float(lipschitz_penalty(projected, 0.5 + 1e-5))) == 0.0


def test_lipschitz_penalty_by_hand() -> None:
    params = {
        "a.row_scale": torch.diag(torch.tensor([3.0, 1.0])),
        "b.bias_shift": torch.eye(2),
        "c.base_weight": torch.ones(2, 2),
    }
    assert abs(float(lipschitz_penalty(params, 1.0)) - 4.0) < 1e-5
