"""Eq. 1: closed-form KL against Monte Carlo, and the ELBO below the evidence; the sleep phase reads no record."""

from __future__ import annotations

import math

import torch

from common.generator.cvae import gaussian_kl, gaussian_log_likelihood, sample_given_labels, sleep
from common.generator.hypernetwork import generate
from tests.common.privacy.clipping_cases import make_case

G = torch.distributions.Normal


def test_gaussian_kl_agrees_with_monte_carlo() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_scale, prior_mean, prior_log_scale = torch.randn(4, 3, generator=generator, dtype=torch.float64) * 0.5
    draws = mean + log_scale.exp() * torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    gap = G(mean, log_scale.exp()).log_prob(draws) - G(prior_mean, prior_log_scale.exp()).log_prob(draws)
    estimates = gap.sum(1)
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert abs(float(gaussian_kl(mean, log_scale, prior_mean, prior_log_scale) - estimates.mean())) < 5 * error


def test_gaussian_kl_by_hand() -> None:
    # KL(N(1, 1) || N(0, 2^2)) = ln 2 + (1 + 1) / 8 - 1/2
    zero, one = torch.zeros(1), torch.ones(1)
    expected = math.log(2) + 0.25 - 0.5
    assert abs(float(gaussian_kl(one, zero, zero, torch.tensor([math.log(2.0)]))) - expected) < 1e-6
    assert float(gaussian_kl(one, one, one, one)) == 0.0


def test_log_likelihood_is_the_gaussian_law() -> None:
    x, mean = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gaussian_log_likelihood(x, mean, 0.3), G(mean, 0.3**0.5).log_prob(x).sum(-1), atol=1e-5)


def test_elbo_is_below_the_evidence_and_meets_it_at_the_true_posterior() -> None:
    # x = w z + noise of variance t, z ~ N(0, 1): p(x) = N(0, w^2 + t), posterior N(w x / (w^2 + t), t / (w^2 + t))
    weight, variance, x = 1.5, 0.4, torch.tensor([0.7])
    evidence = float(G(0.0, math.sqrt(weight**2 + variance)).log_prob(x))
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))

    def elbo(mean: float, scale: float) -> float:
        latent = mean + scale * noise
        likelihood = gaussian_log_likelihood(x, weight * latent, variance).mean()
        log_scale, zero = torch.tensor([math.log(scale)]), torch.zeros(1)
        return float(likelihood - gaussian_kl(torch.tensor([mean]), log_scale, zero, zero))

    total = weight**2 + variance
    best = elbo(weight * 0.7 / total, math.sqrt(variance / total))
    assert abs(best - evidence) < 0.01
    assert elbo(0.0, 1.0) < evidence - 0.1
    assert elbo(0.3, 0.2) < evidence


def test_sleep_learns_to_invert_the_generator_without_a_record() -> None:
    case = make_case(dim=8, latent_dim=1)

    def trained(steps: int) -> dict[str, torch.Tensor]:
        seed = torch.Generator().manual_seed(3)
        return sleep(
            case.shape,
            case.params,
            case.code,
            case.encoder,
            steps=steps,
            rate=0.02,
            batch_size=128,
            generator=seed,
        )

    def loss(encoder: dict[str, torch.Tensor]) -> float:
        from common.generator.cvae import encode
        from common.generator.layers import PlainLayers

        hot = torch.eye(3).repeat(200, 1)
        generated = generate(case.shape, case.params, case.code)
        latent, x = sample_given_labels(case.shape, generated, hot, torch.Generator().manual_seed(9))
        mean, log_scale = encode(case.shape, PlainLayers(encoder), x, hot)
        return -float(G(mean, log_scale.exp()).log_prob(latent).sum(-1).mean())

    assert loss(trained(200)) < loss(case.encoder) - 0.2
    assert trained(0).keys() == case.encoder.keys()
