"""The objective (Eqs. 5-7), apart into what touches records and what does not.

Only `record_losses` reads records; its gradients are clipped and noised. `data_free_loss` depends on Φ, the code,
released statistics and public constants alone: its gradient is post-processing, and needs neither.

The random numbers of `record_losses` (latent noise, synthetic rows) are secret and fresh for every unit. Numbers from a
public seed would be tied to a unit's place in the batch: one record less would shift the numbers of all that follow,
and change every gradient by up to 2 C instead of one by C. With secret independent numbers each unit keeps its own
when another is added, and the guarantee for fixed numbers carries over to their mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.config.generator import TrainingConfig
from common.devices import rows_that_fit, sent_to
from common.findings import label_losses, label_vectors
from common.generator.cvae import encode, gaussian_kl, gaussian_log_likelihood
from common.generator.hypernetwork import (
    GeneratorShape,
    class_prior,
    class_scores,
    decode,
)
from common.generator.layers import Layers, PlainLayers, Tensors
from common.generator.tape import Tape
from common.privacy.clipping import MOST_ROWS
from common.privacy.factors import GradientFactors
from common.privacy.noise import NoiseSource
from common.records import UnitBatch

if TYPE_CHECKING:
    from common.generator.mmd import FeatureTarget

# Numbers in one layer's output over a tile of units: 2 MiB, which stays in a core's cache between two operations.
_TILE = 2**19
# Of the widest layer's output, as many copies as a step holds of a unit: activations, factors, and those in one matrix.
_COPIES = 48


def record_factors(
    shape: GeneratorShape,
    training: TrainingConfig,
    params: Tensors,
    code: Tensor | None,
    encoder: Tensors,
    batch: UnitBatch,
    source: NoiseSource,
    class_offsets: Tensor | None = None,
    *,
    joint: bool = False,
) -> Iterator[GradientFactors]:
    """What every unit's gradient of `record_losses` is made of, some units at a time: memory does not grow with them.

    Args:
        shape: public sizes.
        training: weights of the terms.
        params: Φ.
        code: the site's code, (d_v,), or None.
        encoder: ψ.
        batch: the units drawn; may be none.
        source: see `record_losses`.
        class_offsets: see `record_losses`.
        joint: whether ψ is trained on records too, and so belongs to the gradient.

    Returns:
        Parts for `clipping.clipped_gradient_sum`, each unit whole in one of them. The numbers drawn, and so the sum but
        for its rounding, are those of one part.
    """
    units, rows = batch.mask.shape
    if units == 0:
        return
    tile = units
    if training.mmd != "per-example":  # its draws follow each other by kind, not by unit
        tile = _tile(units, rows, max(shape.dim, shape.model.encoder_width, *shape.model.widths), params)
    for start in range(0, units, tile):
        part = slice(start, start + tile)
        embeddings, labels, mask = batch.embeddings[part], batch.labels[part], batch.mask[part]
        tape = Tape({**params, **encoder} if joint else params, code, labels.shape[0])
        layers = tape if joint else PlainLayers(encoder)
        records = embeddings, labels, mask
        yield tape.factors(record_losses(shape, training, tape, layers, *records, source, class_offsets))


def _tile(units: int, rows: int, widest: int, params: Tensors) -> int:
    """Units to compute at once: what a core's cache holds, or on a GPU, where launches cost most, as many as may be."""
    device = next(iter(params.values())).device
    if device.type == "cpu":
        return math.ceil(units / math.ceil(units * rows * widest / _TILE))
    return rows_that_fit(device, 4.0 * _COPIES * rows * widest, max(MOST_ROWS // rows, 1))


def record_losses(
    shape: GeneratorShape,
    training: TrainingConfig,
    tape: Tape,
    encoder: Layers,
    embeddings: Tensor,
    labels: Tensor,
    mask: Tensor,
    source: NoiseSource,
    class_offsets: Tensor | None = None,
) -> Tensor:
    """Loss of every unit: weighted negative ELBO (Eq. 1), cross-entropy of the class posterior, and MMD cross term.

    Args:
        shape: public sizes.
        training: weights of the terms.
        tape: records the layers.
        encoder: runs the encoder's layers: the tape itself under `joint`, plain layers otherwise.
        embeddings: x around the centre, (U, R, d_x).
        labels: classes (U, R), or findings (U, R, K), of which an unknown one takes no part.
        mask: (U, R), 1 for a record and 0 for padding.
        source: secret draws of the latent noise and synthetic rows, independent of the records and across units.
        class_offsets: (K,) added to the class scores in the cross-entropy, public or released; None for none.

    Returns:
        (U,), each a function of its own unit's records alone. The ELBO is divided by d_x (nats a coordinate).

    Departs from Eqs. 5-7: the regularisers and the data-free parts of MMD are in `data_free_loss`; the
        discriminative term is ours, with adjusted logits as in Menon et al. 2021, eq. 10.
    """
    one_hot = label_vectors(labels, shape.num_classes, embeddings.dtype)
    losses = torch.zeros(embeddings.shape[0], dtype=embeddings.dtype, device=embeddings.device)
    normals = partial(_normals, source=source)
    if training.elbo_weight > 0:
        bounds = elbo(shape, tape, encoder, embeddings, one_hot, normals)
        # Eq. (7), the part that reads records: here, and the two terms below
        losses = losses - training.elbo_weight / shape.dim * (bounds * mask).sum(1)
    if training.discriminative_weight > 0:
        scores = class_scores(shape, tape, embeddings)
        scores = scores if class_offsets is None else scores + class_offsets
        entropy = label_losses(scores, labels)
        losses = losses + training.discriminative_weight * (entropy * mask).sum(1)
    if training.mmd == "per-example":
        from common.generator.mmd import cross_term

        cross = cross_term(shape, tape, embeddings, source, normals)
        losses = losses + training.mmd_weight * (cross * mask).sum(1)
    return losses


def record_normals(training: TrainingConfig, latent_dim: int, records: int) -> int | None:
    """Normals that `record_losses` draws for so many records, in one draw; None where it draws more than once."""
    if training.mmd == "per-example":
        return None
    return records * latent_dim if training.elbo_weight > 0 else 0


def elbo(
    shape: GeneratorShape,
    layers: Layers,
    encoder: Layers,
    embeddings: Tensor,
    one_hot: Tensor,
    normals: Callable[[Tensor], Tensor],
) -> Tensor:
    """One-sample estimate of the ELBO of every record (Eq. 1).

    Args:
        shape: public sizes.
        layers: Φ at a code. encoder: ψ.
        embeddings: x around the centre, (..., d_x). one_hot: y, (..., K).
        normals: gives standard normals in the shape of a tensor.

    Returns:
        (...), in nats.
    """
    if shape.model.latent_dim == 0:
        latent, divergence = embeddings[..., :0], embeddings.new_zeros(embeddings.shape[:-1])
    else:
        mean, log_scale = encode(shape, encoder, embeddings, one_hot)
        latent = mean + torch.exp(log_scale) * normals(mean)
        divergence = gaussian_kl(mean, log_scale, *class_prior(layers, one_hot))
    reconstruction = decode(shape, layers, latent, one_hot)
    likelihood = gaussian_log_likelihood(embeddings, reconstruction, shape.observation_variance)
    return likelihood - divergence  # Eq. (1)


def _normals(like: Tensor, source: NoiseSource) -> Tensor:
    """Secret standard normals in the shape, type and place of `like`."""
    return sent_to(like.device, torch.from_numpy(source.gaussian(tuple(like.shape), 1.0))).to(like)


def data_free_loss(
    shape: GeneratorShape,
    training: TrainingConfig,
    params: Tensors,
    code: Tensor | None,
    target: FeatureTarget | None,
    generator: torch.Generator,
) -> Tensor:
    """Terms of the objective that read no record: MMD against a release, Lipschitz penalty, code norm (Eqs. 5-7).

    Args:
        shape: public sizes.
        training: weights of the terms.
        params: Φ; may require gradients.
        code: the site's code; may require gradients.
        target: released features, for `mmd = "released"`; else None.
        generator: draws the synthetic rows.

    Returns:
        A scalar. Its gradient costs no privacy: post-processing of released values.
    """
    loss = torch.zeros(())
    if training.mmd == "per-example" or target is not None:
        from common.generator.mmd import data_free_term

        loss = loss + training.mmd_weight * data_free_term(shape, params, code, target, generator)
    if training.lipschitz_penalty > 0:
        from common.generator.lipschitz import lipschitz_penalty

        # Eq. (5), the hypernetwork's part; the code's stands below
        loss = loss + training.lipschitz_penalty * lipschitz_penalty(params, training.lipschitz_bound)
    if code is not None and code.numel() > 0 and training.code_penalty > 0:
        # Eq. (5), the code's part
        loss = loss + training.code_penalty * code.square().sum()
    return loss
