"""The encoder q(z | x, y), the two parts of the ELBO (`objective.elbo` joins them), and the encoder's sleep phase.

In the sleep phase (Hinton et al. 1995) the encoder learns to invert the site's own current generator, on samples drawn
from it. It never sees a record, so it is post-processing of what was released already and costs no privacy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from common.adam import adam_step
from common.generator.hypernetwork import LOG_SCALE_BOUND, Generated, GeneratorShape, decode, generate
from common.generator.layers import Layers, PlainLayers, Tensors


def init_encoder_params(shape: GeneratorShape, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw ψ; data-independent. Empty for a generator without a latent."""
    model = shape.model
    if model.latent_dim == 0:
        return {}
    inputs, width = shape.dim + shape.num_classes, model.encoder_width
    return {
        "encoder.0.weight": torch.randn(width, inputs, generator=generator) / math.sqrt(inputs),
        "encoder.0.bias": torch.zeros(width),
        "encoder.1.weight": torch.randn(2 * model.latent_dim, width, generator=generator) / math.sqrt(width),
        "encoder.1.bias": torch.zeros(2 * model.latent_dim),
    }


def encode(shape: GeneratorShape, layers: Layers, embeddings: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation of q(z | x, y).

    Args:
        shape: public sizes.
        layers: runs the layers "encoder.0" and "encoder.1".
        embeddings: x around the centre, (..., d_x).
        one_hot: y, (..., K).

    Returns:
        Two (..., d_z) tensors; the log standard deviation lies within +-2 LOG_SCALE_BOUND.
    """
    # coordinates of a unit-norm embedding are about 1/sqrt(d): a public factor brings them to about 1
    inputs = torch.cat([embeddings * math.sqrt(shape.dim), one_hot], -1)
    hidden = functional.silu(layers.linear("encoder.0", inputs))
    mean, raw = layers.linear("encoder.1", hidden).chunk(2, -1)
    bound = 2 * LOG_SCALE_BOUND
    return mean, bound * torch.tanh(raw / bound)


def gaussian_kl(mean: Tensor, log_scale: Tensor, prior_mean: Tensor, prior_log_scale: Tensor) -> Tensor:
    """KL(N(mean, scale^2) || N(prior)) of diagonal Gaussians in nats, summed over the last axis: (..., d) -> (...)."""
    ratio = torch.exp(2 * (log_scale - prior_log_scale))
    shift = ((mean - prior_mean) * torch.exp(-prior_log_scale)).square()
    return (prior_log_scale - log_scale + 0.5 * (ratio + shift - 1)).sum(-1)


def gaussian_log_likelihood(embeddings: Tensor, mean: Tensor, variance: float) -> Tensor:
    """log N(x; mean, variance I) in nats, summed over the last axis: (..., d) -> (...)."""
    constant = math.log(2 * math.pi * variance) * embeddings.shape[-1]
    return -0.5 * ((embeddings - mean).square().sum(-1) / variance + constant)


def sleep(
    shape: GeneratorShape,
    params: Tensors,
    code: Tensor | None,
    encoder_params: Tensors,
    *,
    steps: int,
    rate: float,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Train the encoder on samples of the generator: maximise E_{p(z, x, y)} log q(z | x, y).

    Args:
        shape: public sizes.
        params: Φ, released.
        code: the site's code, already private.
        encoder_params: ψ.
        steps: a public number of Adam steps (Kingma & Ba 2015).
        rate: learning rate.
        batch_size: samples a step; labels are uniform, so nothing here depends on data.
        generator: source of the samples.

    Returns:
        The new ψ. Costs no privacy: post-processing of (Φ, code).

    Source: Hinton et al. (1995), the wake-sleep algorithm. Departs from Eq. 8 of the paper, which trains ψ on records.
    """
    if not encoder_params or steps == 0:
        return dict(encoder_params)
    trained: dict[str, Tensor] = dict(encoder_params)
    moments: Tensors = {}
    generated = generate(shape, params, code)
    for _ in range(steps):
        trained = {name: value.detach().requires_grad_() for name, value in trained.items()}
        with torch.no_grad():
            one_hot = _any_labels(shape, batch_size, generator)
            latent, embeddings = sample_given_labels(shape, generated, one_hot, generator)
        mean, log_scale = encode(shape, PlainLayers(trained), embeddings, one_hot)
        loss = (log_scale + 0.5 * ((latent - mean) * torch.exp(-log_scale)).square()).sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            # Eq. (8), the step of ψ
            trained, moments = adam_step(trained, dict(zip(trained, gradients, strict=True)), moments, rate)
    return {name: value.detach() for name, value in trained.items()}


def _any_labels(shape: GeneratorShape, count: int, generator: torch.Generator) -> Tensor:
    """Labels from a public law, (n, K): a class each, or one finding on average."""
    if shape.findings:
        return (torch.rand(count, shape.num_classes, generator=generator) * shape.num_classes < 1.0).float()
    return functional.one_hot(
        torch.randint(shape.num_classes, (count,), generator=generator), shape.num_classes
    ).float()


def sample_given_labels(
    shape: GeneratorShape,
    generated: Generated,
    one_hot: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Ancestral samples of (z, x) given labels: (n, K) -> (n, d_z), (n, d_x) around the centre."""
    latent = torch.randn(one_hot.shape[0], shape.model.latent_dim, generator=generator)
    if shape.model.latent_dim:
        latent = one_hot @ generated.prior_mean + torch.exp(one_hot @ generated.prior_log_scale) * latent
    mean = decode(shape, generated.layers, latent, one_hot)
    noise = torch.randn(mean.shape, generator=generator)
    return latent, mean + math.sqrt(shape.observation_variance) * noise
