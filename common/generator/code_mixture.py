"""Eqs. 11 and 13 for several meta-codes, `num-codes` above 1. Imported only where there are several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mixed_moments(moments: Sequence[tuple[Tensor, Tensor]], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of a mixture: covariances within the codes, plus the spread of the codes' means.

    Args:
        moments: of each code, means (K, d_x) and covariance factors (K, d_x, s).
        weights: (k,), they sum to 1.

    Returns:
        means (K, d_x), factors (K, d_x, k s + k).
    """
    means = torch.stack([mean for mean, _ in moments])
    mixed = torch.einsum("k,kcd->cd", weights, means)
    columns = [torch.sqrt(weight) * factor for weight, (_, factor) in zip(weights, moments, strict=True)]
    spread = torch.sqrt(weights)[:, None, None] * (means - mixed)
    return mixed, torch.cat([*columns, spread.permute(1, 2, 0)], -1)


def choose_codes(weights: Tensor, uniforms: Tensor) -> Tensor:
    """A code for each row, by its weight: weights (k,), uniforms (n,) -> (n,) indices."""
    # Eq. (13), a code for each row
    shares = torch.cumsum(weights, 0)
    return torch.searchsorted(shares, uniforms.contiguous(), right=True).clamp(max=len(weights) - 1)
