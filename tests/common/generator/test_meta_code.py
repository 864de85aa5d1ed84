"""Eqs. 11-13 against explicit matrices and against samples."""

from __future__ import annotations

import torch

from common.generator.hypernetwork import generate
from common.generator.meta_code import MetaCodes, fit_meta_codes, generated_moments, moment_loss
from common.generator.placement import place_classes
from common.privacy.combined import ReleasedStatistics
from tests.common.privacy.clipping_cases import make_case
from tests.row_cases import generator_rows


def test_moment_loss_is_eq_11_with_explicit_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    means, targets = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    factors = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    target_covariance, variance, beta = root @ root.T, 0.3, 0.7
    expected = 0.0
    for k in range(3):
        covariance = factors[k] @ factors[k].T + variance * torch.eye(5)
        gap = torch.linalg.matrix_norm(covariance - target_covariance)
        expected += float((means[k] - targets[k]).square().sum() + beta * gap**2)
    found = moment_loss(means, factors, variance, targets, target_covariance, beta)
    assert abs(float(found) - expected) < 1e-6 * expected


def test_generated_moments_are_the_samples_moments() -> None:
    for settings in ({}, {"hidden_widths": "4"}):
        case = make_case(dim=4, **settings)
        generated = generate(case.shape, case.params, case.code)
        normals = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
        means, factors = generated_moments(case.shape, generated, normals)
        meta = MetaCodes(case.code[None], torch.ones(1))
        labels = torch.ones(40_000, dtype=torch.long)
        draws, _ = generator_rows(case.shape, case.params, meta, labels, 1)
        covariance = factors[1] @ factors[1].T + case.shape.observation_variance * torch.eye(4)
        size = float(covariance.diagonal().max())
        assert torch.allclose(draws.mean(0), means[1], atol=0.05 * size**0.5)
        assert torch.allclose(draws.T.cov(), covariance, atol=0.06 * size)


def test_meta_code_is_the_least_squares_solution_where_the_means_are_linear_in_it() -> None:
    # without a latent the mean of class k is (1 + S v) * τ c_k + b + B v: Eq. 11 is a linear least-squares problem
    case = make_case(latent_dim=0, code_dim=2, dim=5)
    p, variance = case.params, case.shape.observation_variance
    centre = torch.randn(5, generator=torch.Generator().manual_seed(1))
    wanted = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    columns = variance * p["decoder.0.class_weight"]
    slopes = [torch.diag(columns[:, k]) @ p["decoder.0.row_scale"] + p["decoder.0.bias_shift"] for k in range(3)]
    gaps = [wanted[k] - columns[:, k] - p["decoder.0.base_bias"] for k in range(3)]
    best = torch.linalg.lstsq(torch.cat(slopes).double(), torch.cat(gaps).double()[:, None]).solution[:, 0].float()
    released = ReleasedStatistics(30.0, centre, torch.full((3,), 10.0), wanted + centre, None, None, {})

    def fitted(radius: float, steps: int = 250) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_codes": 1, "covariance_weight": 0.0, "steps": steps}
        return fit_meta_codes(case.shape, p, released, radius=radius, generator=generator, **options).codes[0]

    assert float(best.norm()) > 0.2
    assert torch.allclose(fitted(100.0), best, atol=2e-3)
    assert float(fitted(0.1, steps=20).norm()) <= 0.1 * (1 + 1e-5)
    assert torch.equal(fitted(100.0, steps=0), torch.zeros(2))


def test_standard_latents_are_eq_12_as_printed() -> None:
    case = make_case(dim=4)
    generated = generate(case.shape, case.params, case.code)
    row_scale = torch.diag(1 + case.params["decoder.0.row_scale"] @ case.code)
    weight = row_scale @ case.params["decoder.0.base_weight"]
    columns = row_scale @ (case.shape.observation_variance * case.params["decoder.0.class_weight"])
    mean = columns[:, 1] + case.params["decoder.0.base_bias"] + case.params["decoder.0.bias_shift"] @ case.code
    covariance = weight @ weight.T + case.shape.observation_variance * torch.eye(4)
    labels, meta = torch.ones(40_000, dtype=torch.long), MetaCodes(case.code[None], torch.ones(1))
    draws, _ = generator_rows(case.shape, case.params, meta, labels, 1, printed=True)
    size = float(covariance.diagonal().max())
    assert torch.allclose(draws.mean(0), mean, atol=0.05 * size**0.5)
    assert torch.allclose(draws.T.cov(), covariance, atol=0.06 * size)
    prior_mean = mean + weight @ generated.prior_mean[1]
    assert float((prior_mean - mean).norm()) > 0.2 * size**0.5  # the generated prior is another law


def test_samples_mixture_is_a_mixture_and_parameters_mixture_is_not() -> None:
    case = make_case(latent_dim=0, code_dim=1, dim=2, residual_energy=1e-4)
    params = {**case.params, "decoder.0.bias_shift": torch.tensor([[5.0], [0.0]])}
    meta = MetaCodes(torch.tensor([[1.0], [-1.0]]), torch.tensor([0.25, 0.75]))
    labels = torch.zeros(4000, dtype=torch.long)

    def first(*, printed: bool) -> torch.Tensor:
        return generator_rows(case.shape, params, meta, labels, printed=printed)[0][:, 0]

    samples, parameters = first(printed=False), first(printed=True)
    assert abs(float((samples > samples.mean()).float().mean()) - 0.25) < 0.03
    assert float(samples.std()) > 4.0  # two modes ten apart
    assert float(parameters.std()) < 0.1  # one mode between them
    assert abs(float(parameters.mean() - samples.mean())) < 0.4


def _released(offsets: torch.Tensor, std: float) -> ReleasedStatistics:
    counts = torch.full((3,), 10.0)
    return ReleasedStatistics(
        30.0, torch.zeros(4), counts, offsets, None, None, {"class_sums": std}, class_offsets=offsets
    )


def test_place_classes_moves_classes_within_the_columns_span_and_less_the_noisier_the_release() -> None:
    case = make_case(latent_dim=0, code_dim=0, dim=4, residual_energy=1e-4)
    columns = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    params = {**case.params, "decoder.0.class_weight": columns, "decoder.0.base_bias": torch.zeros(4)}
    meta = MetaCodes(torch.zeros(1, 0), torch.ones(1))
    offsets = torch.tensor([[3.0, 4.0, 9.0, 9.0], [-0.3, 0.4, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    own = case.shape.observation_variance * columns.T  # where the decoder itself puts the classes
    wanted = torch.cat([offsets[:, :2], torch.zeros(3, 2)], 1)  # the columns span the first two axes
    exact = place_classes(case.shape, params, meta, _released(offsets, 0.0))
    assert exact is not None
    assert torch.allclose(exact, wanted - own, atol=1e-4)
    # noise of 1 in a sum of ten is 0.1 in a mean; twice two axes of it are 0.04 of the squared gaps 25, 0.25 and 0
    noisy = place_classes(case.shape, params, meta, _released(offsets, 1.0))
    assert noisy is not None
    kept = 1.0 - 0.04 / (wanted - own).square().sum(1)
    assert torch.allclose(noisy[:2], (kept[:, None] * (wanted - own))[:2], atol=1e-4)
    assert torch.equal(noisy[2], torch.zeros(4))
    draws, _ = generator_rows(case.shape, params, meta, torch.zeros(500, dtype=torch.long), placement=exact)
    way = (draws - own[0]) @ exact[0] / exact[0].square().sum()  # rows lie all along the way
    assert abs(float(way.mean()) - 0.5) < 0.05
    assert abs(float(way.std()) - 12**-0.5) < 0.03


def test_place_classes_moves_nothing_without_a_release_or_before_training() -> None:
    case = make_case(latent_dim=0, code_dim=0, dim=4)
    meta = MetaCodes(torch.zeros(1, 0), torch.ones(1))
    assert place_classes(case.shape, case.params, meta, None) is None
    untrained = {**case.params, "decoder.0.class_weight": torch.zeros(4, 3)}
    still = place_classes(case.shape, untrained, meta, _released(torch.ones(3, 4), 0.0))
    assert still is not None
    assert torch.equal(still, torch.zeros(3, 4))
