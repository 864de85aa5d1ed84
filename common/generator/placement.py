"""Where a run's classes lie: shifts towards their released means. Post-processing."""

from __future__ import annotations

import torch
from torch import Tensor

from common.generator.hypernetwork import GeneratorShape
from common.generator.layers import Tensors
from common.generator.meta_code import MetaCodes, mixture_means
from common.privacy.combined import ReleasedStatistics

PLACEMENT = "meta.placement"
"""Name of the shifts of `place_classes` among what is published."""


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
        (K, d_x), to be added to a row by its wanted class, before rows are labelled again; None without released means.
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
