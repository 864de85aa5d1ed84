"""After training: the meta-code, mixtures of codes, and where classes lie (Eq. 11). All of it is post-processing.

The meta-code is fitted to the noised statistics that the sites released before training. What rows are drawn from is
`common.generator.rows`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.adam import adam_step
from common.generator import row_numbers
from common.generator.hypernetwork import Generated, GeneratorShape, decode, generate, project_code
from common.generator.layers import Tensors, generated_rows
from common.privacy.combined import ReleasedStatistics

_MOMENT_DRAWS = 64


@dataclass(frozen=True)
class MetaCodes:
    """Codes that no site owns.

    Attributes:
        codes: (k, d_v).
        weights: (k,), >= 0, sum 1.
    """

    codes: Tensor
    weights: Tensor


def generated_moments(shape: GeneratorShape, generated: Generated, normals: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and a factor of the covariance of x, around the centre, for each class.

    Args:
        shape: public sizes.
        generated: H(v).
        normals: (s, d_z) standard normal draws, used where the decoder has hidden layers.

    Returns:
        means (K, d_x), and factors A (K, d_x, s) with Cov = A A^T + τ I. Closed form for a linear decoder.
    """
    one_hot = torch.eye(shape.num_classes, dtype=normals.dtype)
    layers, scale = generated.layers, torch.exp(generated.prior_log_scale)
    if shape.num_layers == 1:
        means = decode(shape, layers, generated.prior_mean, one_hot)
        weight = layers.params[f"{shape.output_layer}.base_weight"]
        row_scale, _ = generated_rows(layers.params, shape.output_layer, layers.features)
        if row_scale is not None:
            weight = weight * row_scale[:, None]
        return means, weight * scale[:, None, :]
    draws = normals.shape[0]
    latent = generated.prior_mean[:, None] + scale[:, None] * normals
    values = decode(shape, layers, latent, one_hot[:, None].expand(-1, draws, -1))
    means = values.mean(1)
    return means, (values - means[:, None]).mT / math.sqrt(draws)


def moment_loss(
    means: Tensor,
    factors: Tensor,
    variance: float,
    target_means: Tensor,
    target_covariance: Tensor | None,
    covariance_weight: float,
) -> Tensor:
    """Eq. 11: sum over classes of |mean - target|^2 + β |Cov - target|_F^2; a scalar.

    The Frobenius norm is expanded, so that no generated (d_x, d_x) matrix is formed:
    |A A^T + τ I - S|^2 = |A^T A|^2 + 2 τ |A|^2 - 2 tr(A^T S A) + |τ I - S|^2.

    Args:
        means: (K, d_x). factors: (K, d_x, s). variance: τ.
        target_means: (K, d_x).
        target_covariance: (d_x, d_x), shared by the classes, or None.
        covariance_weight: β.
    """
    loss = (means - target_means).square().sum()  # Eq. (11)
    if target_covariance is not None and covariance_weight > 0:
        gram = (factors.mT @ factors).square().sum((1, 2)) + 2 * variance * factors.square().sum((1, 2))
        cross = (factors * (target_covariance @ factors)).sum((1, 2))
        rest = (variance * torch.eye(target_covariance.shape[0]) - target_covariance).square().sum()
        loss = loss + covariance_weight * (gram - 2 * cross + rest).sum()
    return loss


def fit_meta_codes(
    shape: GeneratorShape,
    params: Tensors,
    statistics: ReleasedStatistics | None,
    *,
    num_codes: int,
    radius: float,
    covariance_weight: float,
    steps: int,
    generator: torch.Generator,
    rate: float = 0.05,
) -> MetaCodes:
    """Fit codes whose generated moments meet the released ones (Eq. 11), by projected gradient descent.

    Args:
        shape: public sizes.
        params: Φ.
        statistics: released class means and, if asked for, covariance; without means the neutral code 0 is returned.
        num_codes: how many codes; above 1 their mixture's moments are fitted, weights included.
        radius: codes stay within this norm.
        covariance_weight: β of Eq. 11.
        steps: Adam steps.
        generator: draws the starting points of several codes and Monte Carlo normals.

    Returns:
        The codes and their weights.

    Departs from Eq. 11: where class means were shrunk for noise, the shrunk means are the target.
    """
    width = shape.model.code_dim
    codes = torch.randn(num_codes, width, generator=generator) * (0.1 if num_codes > 1 else 0.0)
    logits = torch.zeros(num_codes)
    weights = torch.softmax(logits, 0)
    if width == 0 or statistics is None or statistics.class_means is None or steps == 0:
        return MetaCodes(codes, weights)
    normals = torch.randn(_MOMENT_DRAWS, shape.model.latent_dim, generator=generator)
    targets = statistics.class_means - statistics.centre
    fitted: dict[str, Tensor] = {"codes": codes, "logits": logits}
    moments: Tensors = {}
    for _ in range(steps):
        fitted = {name: value.detach().requires_grad_() for name, value in fitted.items()}
        weights = torch.softmax(fitted["logits"], 0)
        means, factors = _moments(shape, params, fitted["codes"], weights, normals)
        # Eq. (11), minimised
        loss = moment_loss(
            means, factors, shape.observation_variance, targets, statistics.covariance, covariance_weight
        )
        gradients = torch.autograd.grad(loss, list(fitted.values()), materialize_grads=True, allow_unused=True)
        with torch.no_grad():
            fitted, moments = adam_step(fitted, dict(zip(fitted, gradients, strict=True)), moments, rate)
            fitted["codes"] = torch.stack([project_code(code, radius) for code in fitted["codes"]])
    return MetaCodes(fitted["codes"].detach(), torch.softmax(fitted["logits"].detach(), 0))


def _moments(
    shape: GeneratorShape, params: Tensors, codes: Tensor, weights: Tensor, normals: Tensor
) -> tuple[Tensor, Tensor]:
    """Generated moments over all codes: see `generated_moments`."""
    parts = [generated_moments(shape, generate(shape, params, code), normals) for code in codes]
    if len(parts) == 1:
        return parts[0]
    from common.generator.code_mixture import mixed_moments

    return mixed_moments(parts, weights)


def mixture_means(shape: GeneratorShape, params: Tensors, meta: MetaCodes) -> Tensor:
    """Generated class means around the centre, over all codes: (K, d_x)."""
    # public, and the same on every machine: of the Monte Carlo means of a decoder with hidden layers
    key, rows = row_numbers.row_key("moments", 0), np.arange(_MOMENT_DRAWS)
    drawn = row_numbers.normals(row_numbers.row_words(key, rows, shape.model.latent_dim, 0))
    return _moments(shape, params, meta.codes, meta.weights, drawn.to(meta.codes.dtype))[0]
