"""Where each class of a discriminatively trained generator lies, for the rows that are drawn without noise.

The columns of such a decoder point the right way and are several times too short: training stops once they tell the
classes apart. One factor for all columns is a regression of the released means on them. It has one unknown, so the
noise of the release hardly shows in it, where single means drown. One shift of all prototypes then makes the nearest of
them, anywhere, that of the class which the generator's own posterior finds likeliest: a head that compares distances
learns what the generator knows. All of it is post-processing of released values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.generator.hypernetwork import GeneratorShape, score_head
from common.generator.layers import PlainLayers, Tensors
from common.generator.meta_code import MetaCodes, mixture_means
from common.privacy.combined import ReleasedStatistics

PROTOTYPES = "meta.prototypes"
"""Name of the class prototypes among what is published."""
_LEAST_NOISE = 1e-9  # of a released mean, where a run draws none


def class_prototypes(
    shape: GeneratorShape, params: Tensors, meta: MetaCodes, statistics: ReleasedStatistics | None
) -> Tensor | None:
    """One embedding a class, around the centre: class columns at their fitted length, shifted as the posterior asks.

    Args:
        shape: public sizes.
        params: Φ.
        meta: the codes; of a mixture the mean, and the mean posterior, are meant.
        statistics: with class means, or there is nothing to fit the length to.

    Returns:
        (K, d_x); None without released means. The factor is at least 0, and is pulled towards the decoder's own length
        as by one more observation of variance 1: little data leaves it there. The nearest prototype of any embedding is
        that of its likeliest class, for one code exactly.

    Source: weighted least squares with a normal prior (Bishop 2006, Eq. 3.50); a linear classifier as the cells of
        points (Aurenhammer 1987, power diagrams; here the shift takes the place of the points' weights).
    """
    if statistics is None or statistics.class_offsets is None:
        return None
    weight, bias = posterior_head(shape, params, meta)
    contrasts = weight - weight.mean(0)
    directions = shape.observation_variance * contrasts
    means = mixture_means(shape, params, meta)
    rest = means - directions
    noise = (statistics.noise_std["class_sums"] / statistics.class_counts).clamp(min=_LEAST_NOISE)
    certainty = (directions.square().sum(1) / noise.square()).sum()
    seen = (((statistics.class_offsets - rest) * directions).sum(1) / noise.square()).sum()
    factor = ((seen + 1.0) / (certainty + 1.0)).clamp(min=0.0)
    points = means.mean(0) + factor * directions
    length = factor * shape.observation_variance
    if not bool(length > 0):
        return points
    # |x - p|^2 falls as 2 x.p - |p|^2 rises. With p = point + shift that is 2 length (w.x + b), up to what all classes
    # share, if w.shift makes up for b and |point|^2
    wanted = -bias - points.square().sum(1) / (2.0 * length)
    shift = torch.linalg.pinv(contrasts.double(), rtol=1e-6) @ (wanted - wanted.mean()).double()
    return points + shift.float()


def posterior_head(shape: GeneratorShape, params: Tensors, meta: MetaCodes) -> tuple[Tensor, Tensor]:
    """The generator's class scores as a linear head around the centre, mean over codes: (K, d_x), (K,)."""
    weight, bias = torch.zeros(shape.num_classes, shape.dim), torch.zeros(shape.num_classes)
    for code, share in zip(meta.codes, meta.weights, strict=True):
        of_code, offset = score_head(shape, PlainLayers.at(params, code))
        weight += share * of_code
        bias += share * offset
    return weight, bias
