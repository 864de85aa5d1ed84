"""After training: the meta-code, mixtures of codes, and the synthetic set (Eqs. 11-13). All of it is post-processing.

The meta-code is fitted to the noised statistics that the sites released before training. Samples may be drawn without
limit: they are functions of released values, so drawing more costs no privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from common.adam import adam_step
from common.cvae import decoded_given_labels
from common.hypernetwork import (
    Generated,
    GeneratorShape,
    class_scores,
    decode,
    generate,
    mix_generated,
    project_code,
)
from common.statistics import ReleasedStatistics
from common.tape import Tensors

_MOMENT_DRAWS = 64
PLACEMENT = "meta.placement"
"""Name of the shifts of `place_classes` among what is published."""


@dataclass(frozen=True)
class MetaCodes:
    """Codes that no site owns.

    Attributes:
        codes: (k, d_v).
        weights: (k,), >= 0, sum 1.
    """

    codes: Tensor
    weights: Tensor


def generated_moments(
    shape: GeneratorShape, params: Tensors, generated: Generated, normals: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and a factor of the covariance of x, around the centre, for each class.

    Args:
        shape: public sizes.
        params: Φ.
        generated: H(v).
        normals: (s, d_z) standard normal draws, used where the decoder has hidden layers.

    Returns:
        means (K, d_x), and factors A (K, d_x, s) with Cov = A A^T + τ I. Closed form for a linear decoder.
    """
    one_hot = torch.eye(shape.num_classes)
    scale = torch.exp(generated.prior_log_scale)
    if shape.num_layers == 1:
        means = decode(shape, params, generated.features, generated.prior_mean, one_hot)
        weight = params[f"{shape.output_layer}.base_weight"]
        if generated.features is not None:
            weight = weight * (1.0 + params[f"{shape.output_layer}.row_scale"] @ generated.features)[:, None]
        return means, weight * scale[:, None, :]
    draws = normals.shape[0]
    latent = generated.prior_mean[:, None] + scale[:, None] * normals
    values = decode(shape, params, generated.features, latent, one_hot[:, None].expand(-1, draws, -1))
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
    loss = (means - target_means).square().sum()
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
        means, factors = _mixture_moments(shape, params, fitted["codes"], weights, normals)
        loss = moment_loss(
            means, factors, shape.observation_variance, targets, statistics.covariance, covariance_weight
        )
        gradients = torch.autograd.grad(loss, list(fitted.values()), materialize_grads=True, allow_unused=True)
        with torch.no_grad():
            fitted, moments = adam_step(fitted, dict(zip(fitted, gradients, strict=True)), moments, rate)
            fitted["codes"] = torch.stack([project_code(code, radius) for code in fitted["codes"]])
    return MetaCodes(fitted["codes"].detach(), torch.softmax(fitted["logits"].detach(), 0))


def _mixture_moments(
    shape: GeneratorShape, params: Tensors, codes: Tensor, weights: Tensor, normals: Tensor
) -> tuple[Tensor, Tensor]:
    """Moments of the mixture over codes: within-code covariances plus the spread of the codes' means."""
    parts = [generated_moments(shape, params, generate(shape, params, code), normals) for code in codes]
    means = torch.stack([mean for mean, _ in parts])
    mixed = torch.einsum("k,kcd->cd", weights, means)
    columns = [torch.sqrt(weight) * factor for weight, (_, factor) in zip(weights, parts, strict=True)]
    if len(parts) > 1:
        spread = torch.sqrt(weights)[:, None, None] * (means - mixed)
        columns.append(spread.permute(1, 2, 0))
    return mixed, torch.cat(columns, -1)


def mixture_means(shape: GeneratorShape, params: Tensors, meta: MetaCodes) -> Tensor:
    """Generated class means around the centre, over all codes: (K, d_x)."""
    generator = torch.Generator().manual_seed(0)  # public: of the Monte Carlo means of a decoder with hidden layers
    normals = torch.randn(_MOMENT_DRAWS, shape.model.latent_dim, generator=generator)
    return _mixture_moments(shape, params, meta.codes, meta.weights, normals)[0]


def place_classes(
    shape: GeneratorShape, params: Tensors, meta: MetaCodes, statistics: ReleasedStatistics | None
) -> Tensor | None:
    """Shifts that bring each class to its released mean, in the directions that tell the classes apart.

    The columns of a discriminatively trained decoder say where boundaries run, and little of where classes lie. A
    released mean says it, but its noise grows with all d_x directions; in the K - 1 that the columns span it is small.
    What noise remains shrinks the shift (James & Stein 1961, positive part, with twice their factor: a class moved the
    wrong way costs more than one that stays). Post-processing of two released values.

    Args:
        shape: public sizes.
        params: Φ.
        meta: the codes; a mixture's mean is moved.
        statistics: with class means, or nothing is moved.

    Returns:
        (K, d_x), to be added to a row by its wanted class, before rows are labelled anew; None without released means.
    """
    if statistics is None or statistics.class_offsets is None:
        return None
    columns = params[f"{shape.output_layer}.class_weight"]
    left, strengths, _ = torch.linalg.svd(columns - columns.mean(1, keepdim=True), full_matrices=False)
    basis = left[:, strengths > 1e-6 * strengths.max().clamp(min=1e-12)]
    if basis.shape[1] == 0:
        return torch.zeros_like(statistics.class_offsets)
    gap = (statistics.class_offsets - mixture_means(shape, params, meta)) @ basis
    noise = basis.shape[1] * (statistics.noise_std["class_sums"] / statistics.class_counts) ** 2
    kept = (1.0 - 2.0 * noise / gap.square().sum(1).clamp(min=1e-12)).clamp(min=0.0)
    return (kept[:, None] * gap) @ basis.T


def sample_embeddings(
    shape: GeneratorShape,
    params: Tensors,
    meta: MetaCodes,
    labels: Tensor,
    generator: torch.Generator,
    *,
    mixture: Literal["samples", "parameters"] = "samples",
    latent_law: Literal["prior", "standard"] = "prior",
    relabel: Literal["none", "likeliest", "drawn"] = "none",
    temperature: float = 1.0,
    placement: Tensor | None = None,
    centre: Tensor | None = None,
    prototypes: Tensor | None = None,
    prototype_share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw synthetic embeddings around the centre (Eqs. 12-13).

    Args:
        shape: public sizes.
        params: Φ.
        meta: codes and weights.
        labels: (n,) wanted classes.
        generator: source of the samples.
        mixture: "samples" draws a code for each row; "parameters" averages generated parameters as Eq. 13 prints.
        latent_law: "prior" draws z from the generated prior as Eq. 11 means; "standard" from N(0, I) as Eq. 12 prints.
        relabel: keep the wanted label, or give each row the class that the generator's own posterior finds likeliest
            there, or one drawn from that posterior.
        temperature: T > 0; the posterior's logits are divided by it before a draw.
        placement: (K, d_x) shifts of the wanted classes, from `place_classes`, or None. Each row is moved a part of the
            way, uniform on [0, 1].
        centre: (d_x,), where embeddings have unit length and so should rows: the noise then has what a row's mean
            leaves of it, in expectation. None keeps the decoder's variance.
        prototypes: (K, d_x), from `class_prototypes`, or None.
        prototype_share: that share of the rows is the prototype of the wanted class itself, without noise.

    Returns:
        embeddings (n, d_x) and labels (n,).
    """
    parts = [generate(shape, params, code) for code in meta.codes]
    if mixture == "parameters" and len(parts) > 1:
        parts, chosen = [mix_generated(parts, meta.weights)], torch.zeros_like(labels)
    elif len(parts) > 1:
        chosen = torch.multinomial(meta.weights, labels.shape[0], replacement=True, generator=generator)
    else:
        chosen = torch.zeros_like(labels)
    embeddings = torch.empty(labels.shape[0], shape.dim)
    drawn = labels.clone()
    for index, part in enumerate(parts):
        rows = torch.nonzero(chosen == index)[:, 0]
        one_hot = functional.one_hot(labels[rows], shape.num_classes).float()
        _, values = decoded_given_labels(
            shape, params, part, one_hot, generator, standard_latent=latent_law == "standard"
        )
        noise = torch.randn(values.shape, generator=generator)
        if placement is not None:
            # any part of the way: rows lie between the classes too, where a head learns the boundaries
            way = torch.rand(rows.numel(), 1, generator=generator)
            values = values + way * placement[labels[rows]]
        values = values + _noise_scale(shape, values, centre) * noise
        if prototypes is not None and prototype_share > 0:
            bare = torch.rand(rows.numel(), 1, generator=generator) < prototype_share
            values = torch.where(bare, prototypes[labels[rows]], values)
        embeddings[rows] = values
        if relabel != "none" and rows.numel() > 0:
            scores = class_scores(shape, params, part.features, values)
            drawn[rows] = relabelled(scores, relabel, temperature, generator)
    return embeddings, drawn


def _noise_scale(shape: GeneratorShape, means: Tensor, centre: Tensor | None) -> Tensor:
    """Standard deviation of the noise in a coordinate: the decoder's, or what brings rows to unit length: (n, 1)."""
    if centre is None:
        return means.new_full((means.shape[0], 1), math.sqrt(shape.observation_variance))
    left = 1.0 - (means + centre).square().sum(1, keepdim=True)
    return (left.clamp(min=0.0) / shape.dim).sqrt()


def relabelled(
    scores: Tensor, relabel: Literal["likeliest", "drawn"], temperature: float, generator: torch.Generator
) -> Tensor:
    """Labels from class scores (log posterior up to a constant): (n, K) -> (n,). See `sample_embeddings`."""
    if relabel == "likeliest":
        return scores.argmax(1)
    return torch.multinomial(torch.softmax(scores / temperature, 1), 1, generator=generator)[:, 0]
