"""Drawing synthetic embeddings from a trained generator (Eqs. 12-13). All of it is post-processing.

Samples may be drawn without limit: they are functions of released values, so drawing more costs no privacy.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from common.cvae import decoded_given_labels
from common.hypernetwork import GeneratorShape, class_scores, generate, mix_generated
from common.synthesis import MetaCodes, mixture_means
from common.tape import Tensors


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
    prototype_spread: float = 0.0,
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
        prototype_spread: that share of the prototypes is drawn around itself as the latent spreads its class.

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
    spreads = prototypes is not None and prototype_spread > 0 and shape.model.latent_dim > 0
    spread_around = mixture_means(shape, params, meta) if spreads else None
    embeddings = torch.empty(labels.shape[0], shape.dim)
    drawn = labels.clone()
    for index, part in enumerate(parts):
        rows = torch.nonzero(chosen == index)[:, 0]
        one_hot = functional.one_hot(labels[rows], shape.num_classes).float()
        _, values = decoded_given_labels(
            shape, params, part, one_hot, generator, standard_latent=latent_law == "standard"
        )
        decoded = values
        noise = torch.randn(values.shape, generator=generator)
        if placement is not None:
            # any part of the way: rows lie between the classes too, where a head learns the boundaries
            way = torch.rand(rows.numel(), 1, generator=generator)
            values = values + way * placement[labels[rows]]
        values = values + _noise_scale(shape, values, centre) * noise
        if prototypes is not None and prototype_share > 0:
            bare = torch.rand(rows.numel(), 1, generator=generator) < prototype_share
            still = prototypes[labels[rows]]
            if spread_around is not None:
                wide = torch.rand(rows.numel(), 1, generator=generator) < prototype_spread
                still = still + wide * (decoded - spread_around[labels[rows]])
            values = torch.where(bare, still, values)
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
