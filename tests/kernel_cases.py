"""Eq. 6 in one piece, for tests to compare its parts with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from common.kernels import gaussian_kernel


def mmd2(left: Tensor, right: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Squared maximum mean discrepancy, biased V-statistic with a multi-bandwidth Gaussian kernel.

    Args:
        left: (n, d).
        right: (m, d).
        bandwidths: public constants, in units of the embeddings.

    Returns:
        A scalar >= 0 up to rounding.

    Source: Eq. 6 of the paper; Gretton et al. (2012), Eq. 5 with i = j kept.
    """
    within = gaussian_kernel(left, left, bandwidths).mean() + gaussian_kernel(right, right, bandwidths).mean()
    return within - 2.0 * gaussian_kernel(left, right, bandwidths).mean()
