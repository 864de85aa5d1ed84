"""Where each class of a discriminatively trained generator lies, for the rows that are drawn without noise.

The columns of such a decoder point the right way and are several times too short: training stops once they tell the
classes apart. One factor for all columns is a regression of the released means on them. It has one unknown, so the
noise of the release hardly shows in it, where single means drown. All of it is post-processing of released values.
"""

from __future__ import annotations

from torch import Tensor

from common.hypernetwork import GeneratorShape
from common.statistics import ReleasedStatistics
from common.synthesis import MetaCodes, mixture_means
from common.tape import Tensors

PROTOTYPES = "meta.prototypes"
"""Name of the class prototypes among what is published."""
_LEAST_NOISE = 1e-9  # of a released mean, where a run draws none


def class_prototypes(
    shape: GeneratorShape, params: Tensors, meta: MetaCodes, statistics: ReleasedStatistics | None
) -> Tensor | None:
    """One embedding a class, around the centre: the generated mean with its class column at its fitted length.

    Args:
        shape: public sizes.
        params: Φ.
        meta: the codes; a mixture's mean is meant.
        statistics: with class means, or there is nothing to fit the length to.

    Returns:
        (K, d_x); None without released means. The factor is at least 0, and is pulled towards the decoder's own length
        as by one more observation of variance 1: little data leaves it there.

    Source: weighted least squares with a normal prior (Bishop 2006, Eq. 3.50).
    """
    if statistics is None or statistics.class_offsets is None:
        return None
    columns = shape.observation_variance * params[f"{shape.output_layer}.class_weight"].T
    directions = columns - columns.mean(0)
    rest = mixture_means(shape, params, meta) - directions
    noise = (statistics.noise_std["class_sums"] / statistics.class_counts).clamp(min=_LEAST_NOISE)
    certainty = (directions.square().sum(1) / noise.square()).sum()
    seen = (((statistics.class_offsets - rest) * directions).sum(1) / noise.square()).sum()
    factor = ((seen + 1.0) / (certainty + 1.0)).clamp(min=0.0)
    return rest + factor * directions
