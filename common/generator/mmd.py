"""Eq. 6, the two forms of MMD, for `mmd` = `released` or `per-example`. Imported only where a run asks for one.

`released` compares generated rows with noised random Fourier features of the records: its gradient is post-processing.
`per-example` puts the part of Eq. 6 that reads a record into that record's clipped gradient; the part over synthetic
rows stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.config.generator import MMD_BANDWIDTHS, MMD_FEATURES
from common.devices import sent_to
from common.generator.cvae import sample_given_labels
from common.generator.hypernetwork import GeneratorShape, class_prior, decode, generate
from common.generator.layers import Layers, Tensors
from common.kernels import fourier_features, fourier_frequencies, gaussian_kernel
from common.privacy.combined import ReleasedStatistics
from common.privacy.noise import NoiseSource


@dataclass(frozen=True)
class FeatureTarget:
    """Released random Fourier features of the embeddings: what the `released` MMD compares with.

    Attributes:
        frequencies: (D / 2, d_x), public.
        class_means: (K, D), noised mean features a class.
        class_weights: (K,), noised shares of the classes; they sum to 1.
        centre: (d_x,), which the generator's rows lie around, and the features' embeddings do not.
    """

    frequencies: Tensor
    class_means: Tensor
    class_weights: Tensor
    centre: Tensor


def public_frequencies(dim: int, seed: int) -> Tensor:
    """Frequencies of the Fourier features, from the run's public seed: (D / 2, d_x)."""
    return fourier_frequencies(dim, MMD_FEATURES, MMD_BANDWIDTHS, seed)


def pack_target(statistics: ReleasedStatistics) -> Tensor:
    """Noised mean features and class shares as one tensor that sites receive: (K, D + 1)."""
    if statistics.class_features is None:
        raise ValueError("expected released class features, found none")
    shares = statistics.class_counts / statistics.class_counts.sum()
    return torch.cat([statistics.class_features, shares[:, None]], 1)


def unpack_target(packed: Tensor, frequencies: Tensor, centre: Tensor) -> FeatureTarget:
    """The target from what the server sent: see `pack_target`."""
    shares = packed[:, -1].clamp(min=0.0)
    weights = shares / shares.sum().clamp(min=1e-12)
    return FeatureTarget(frequencies, packed[:, :-1], weights, centre)


def cross_term(
    shape: GeneratorShape,
    layers: Layers,
    embeddings: Tensor,
    source: NoiseSource,
    normals: Callable[[Tensor], Tensor],
) -> Tensor:
    """-2 k(x, x̂) with one synthetic row x̂ a record, drawn with a label from a public law (Eq. 6): (U, R).

    Args:
        shape: public sizes. layers: Φ at a code.
        embeddings: x around the centre, (U, R, d_x).
        source: secret draws of the labels. normals: gives secret standard normals in the shape of a tensor.
    """
    units, rows = embeddings.shape[:2]
    uniform = sent_to(embeddings.device, torch.from_numpy(source.uniform(units * rows))).view(units, rows)
    drawn = (uniform * shape.num_classes).long().clamp(0, shape.num_classes - 1)
    labels = functional.one_hot(drawn, shape.num_classes).to(embeddings)
    latent = embeddings.new_zeros(units, rows, 0)
    if shape.model.latent_dim:
        mean, log_scale = class_prior(layers, labels)
        latent = mean + torch.exp(log_scale) * normals(mean)
    synthetic = decode(shape, layers, latent, labels)
    synthetic = synthetic + shape.observation_variance**0.5 * normals(embeddings)
    kernel = gaussian_kernel(embeddings[:, :, None, :], synthetic[:, :, None, :], MMD_BANDWIDTHS)
    return -2.0 * kernel[:, :, 0, 0]  # Eq. (6), the third sum


def data_free_term(
    shape: GeneratorShape,
    params: Tensors,
    code: Tensor | None,
    target: FeatureTarget | None,
    generator: torch.Generator,
    samples_per_class: int = 16,
) -> Tensor:
    """The part of Eq. 6 that reads no record: against a release, or the sum over synthetic rows; a scalar.

    Args:
        shape: public sizes. params: Φ. code: the site's code.
        target: released features; None for the part that stands beside `cross_term`.
        generator: draws the synthetic rows. samples_per_class: how many of each class.
    """
    labels = torch.arange(shape.num_classes).repeat_interleave(samples_per_class)
    one_hot = functional.one_hot(labels, shape.num_classes).float()
    _, synthetic = sample_given_labels(shape, generate(shape, params, code), one_hot, generator)
    if target is None:
        return gaussian_kernel(synthetic, synthetic, MMD_BANDWIDTHS).mean()  # Eq. (6), the sum over synthetic rows
    features = fourier_features(synthetic + target.centre, target.frequencies)
    means = features.view(shape.num_classes, samples_per_class, -1).mean(1)
    gaps = (means - target.class_means).square().sum(1)
    return (target.class_weights * gaps).sum()  # Eq. (6), against a release
