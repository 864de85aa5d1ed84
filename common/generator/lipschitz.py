"""Eq. 5, the Lipschitz penalty, for `lipschitz-penalty` above 0. Imported only where a run asks for it.

The bound itself is held by projection in every run (`hypernetwork.project_spectral_norms`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.generator.hypernetwork import hypernetwork_heads
from common.generator.layers import Tensors


def lipschitz_penalty(params: Tensors, bound: float) -> Tensor:
    """R_Lip = sum over the hypernetwork's heads of max(0, |W|_2 - bound)^2 (Eq. 5); a scalar, touches no data."""
    norms = [torch.linalg.matrix_norm(params[name], ord=2) for name in hypernetwork_heads(params)]
    # Eq. (5), the norms beyond the bound
    return torch.stack(norms).sub(bound).clamp(min=0).square().sum() if norms else torch.zeros(())
