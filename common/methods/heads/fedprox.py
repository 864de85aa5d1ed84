"""FedProx: FedAvg whose local training is pulled towards the global head by μ/2 |w - w_global|^2. Not private.

Li et al. (2020), Algorithm 2.
"""

from __future__ import annotations

from torch import Tensor

from common.methods.base import Method, RunContext, SiteState, StepInput
from common.methods.heads import fedavg
from common.methods.heads.linear import centre_statistics, with_centre
from common.methods.plans import nonprivate_plan


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """FedAvg's local epochs with the proximal term. What is sent depends on the records without noise."""
    return work.site, fedavg.local_head(context, work, context.config.rivals.prox_mu)


METHOD = Method(
    name="fedprox",
    private=False,
    plan=nonprivate_plan,
    statistics=centre_statistics,
    init=fedavg.init,
    prepare=with_centre,
    upload_shapes=fedavg.upload_shapes,
    client_step=client_step,
    server_step=fedavg.server_step,
    finish=fedavg.finish,
)
