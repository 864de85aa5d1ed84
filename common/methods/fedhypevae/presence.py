"""How much each site's noised sums count for each class: as much as the site is likely to have records of it at all.

Where classes are spread unevenly, a site without a class sends noise in that class's part of the sum, as much as a site
that is full of it. Leaving such parts out makes the sum less noisy, and costs no privacy: the weights are functions of
the sites' released counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def presence_weights(counts: Tensor, noise_std: float) -> Tensor:
    """Weights of the sites' sums, class by class; post-processing.

    A weight is the chance that noise alone did not make the site's count, Φ(count / noise), drawn towards 1 as far as
    the sites' counts differ by no more than noise, and two standard errors of its estimate: sites that are alike count
    alike. Classes are then brought to their whole number of records again, so that none weighs less than before.

    Args:
        counts: (m, K), each site's noised class counts.
        noise_std: standard deviation of the noise in one count; with 0 all weights are 1, as nothing can be gained.

    Returns:
        (m, K), at least 0.

    Source: the shrinkage is empirical Bayes with the moments' estimate of the spread (Efron & Morris 1973).
    """
    if noise_std == 0 or counts.shape[0] < 2:
        return torch.ones_like(counts)
    square = noise_std * noise_std
    doubt = 2.0 * math.sqrt(2.0 / (counts.shape[0] - 1))
    spread = (counts.var(0) - (1.0 + doubt) * square).clamp(min=0.0)
    kept = spread / (spread + square)
    mean = counts.mean(0)
    expected = (mean + kept * (counts - mean)).clamp(min=0.0)
    weights = 1.0 - kept * (1.0 - torch.special.ndtr(counts / noise_std))
    held, before = (weights * expected).sum(0), expected.sum(0)
    return weights * torch.where(held > 0, before / held.clamp(min=1e-12), torch.ones_like(held))
