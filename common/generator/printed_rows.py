"""Eqs. 12-13 as the paper prints them, for `printed-rows`. Imported only where a run asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.generator.hypernetwork import Generated
from common.generator.layers import PlainLayers


def as_printed(parts: Sequence[Generated], weights: Tensor) -> Generated:
    """What rows are drawn from as printed: the average of generated parameters, with latents from N(0, I).

    Row scales and shifts are linear in the features, so averaging the features averages them. The average is no mixture
    of laws, and the generated priors, which Eq. 11 was fitted with, take no part.

    Args:
        parts: what the hypernetwork makes of each code.
        weights: (k,), they sum to 1.
    """
    features = [part.layers.features for part in parts if part.layers.features is not None]
    # Eq. (13), parameters in place of laws
    mixed = torch.einsum("k,k...->...", weights, torch.stack(features)) if features else None
    standard = torch.zeros_like(parts[0].prior_mean)  # Eq. (12), z of N(0, I)
    return Generated(PlainLayers(parts[0].layers.params, features=mixed), standard, standard)
