"""Gaussian kernels (Eq. 6), and random Fourier features of the same kernel.

Bandwidths are public constants: the median of raw distances would be an uncharged release.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian_kernel(left: Tensor, right: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Mean over bandwidths h of exp(-|x - y|^2 / (2 h^2)): (..., n, d), (..., m, d) -> (..., n, m), in (0, 1]."""
    squared = (left.square().sum(-1)[..., :, None] + right.square().sum(-1)[..., None, :] - 2 * left @ right.mT).clamp(
        min=0.0
    )
    kernels = [torch.exp(squared / (-2.0 * width * width)) for width in bandwidths]
    return torch.stack(kernels).mean(0)


def fourier_frequencies(dim: int, count: int, bandwidths: Sequence[float], seed: int) -> Tensor:
    """Frequencies of random Fourier features, (count // 2, dim): public, from a public seed.

    Source: Rahimi & Recht (2007). Rows are shared out over the bandwidths in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    half = max(count // 2, 1)
    widths = torch.tensor([bandwidths[row % len(bandwidths)] for row in range(half)])
    return torch.randn(half, dim, generator=generator) / widths[:, None]


def fourier_features(embeddings: Tensor, frequencies: Tensor) -> Tensor:
    """Features whose inner products estimate the kernel: (..., d) -> (..., 2 * half), each row of norm exactly 1."""
    angles = embeddings @ frequencies.T
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1) / math.sqrt(frequencies.shape[0])
