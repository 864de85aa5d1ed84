"""FedProx: FedAvg whose local training is pulled towards the global head by μ/2 |w - w_global|^2. Not private.

Li et al. (2020), Algorithm 2.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from common.methods.base import RunContext, SiteState, StepInput
from common.methods.heads import fedavg


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """FedAvg's local epochs with the proximal term. What is sent depends on the records without noise."""
    return work.site, fedavg.local_head(context, work, context.config.rivals.prox_mu)


METHOD = replace(fedavg.METHOD, name="fedprox", client_step=client_step)
