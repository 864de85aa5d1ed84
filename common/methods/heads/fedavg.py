"""FedAvg: n_i-weighted averages of linear heads that the sites train by local SGD. Not private.

McMahan et al. (2017), Algorithm 1. Trained on centred embeddings with the same penalty as the centralised head, so that
what it loses against it is due to averaging alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from common.methods.base import Artifact, Method, RunContext, ServerState, Shapes, SiteState, StepInput, Tensors, seeded
from common.methods.constants import CENTRE
from common.methods.features import feature_scale, head_features
from common.methods.heads.linear import centre_statistics, descend_head, head_artifact, with_centre
from common.methods.plans import nonprivate_plan


def init(context: RunContext) -> ServerState:
    """A head of zeros."""
    problem = context.problem
    return ServerState(
        0,
        {
            "weight": torch.zeros(problem.num_classes, problem.dim),
            "bias": torch.zeros(problem.num_classes),
            CENTRE: torch.zeros(problem.dim),
        },
    )


def upload_shapes(context: RunContext) -> Shapes:
    """The site's head and its number of records."""
    num_classes, dim = context.problem.num_classes, context.problem.dim
    return {"weight": (num_classes, dim), "bias": (num_classes,), "num_examples": (1,)}


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, torch.Tensor]]:
    """Local epochs of SGD from the global head. What is sent depends on the records without noise."""
    return work.site, local_head(context, work, 0.0)


def local_head(context: RunContext, work: StepInput, prox_mu: float) -> dict[str, torch.Tensor]:
    """What a site sends: its head after local SGD with a proximal term of weight `prox_mu`, and n_i."""
    weight, bias = descend_head(
        work.params["weight"],
        work.params["bias"],
        head_features(context, work.data.embeddings, work.params[CENTRE]),
        work.data.labels,
        context.config.rivals,
        seeded("order", context.config.federation.seed, work.site_index, work.round_index),
        prox_mu,
    )
    return {"weight": weight, "bias": bias, "num_examples": torch.tensor([float(work.data.labels.shape[0])])}


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """The average of the sites' heads, weighted by their numbers of records."""
    sites = sorted(uploads)
    counts = torch.cat([uploads[site]["num_examples"] for site in sites])
    shares = counts / counts.sum().clamp(min=1.0)
    averaged = {
        name: torch.einsum("s,s...->...", shares, torch.stack([uploads[site][name] for site in sites]))
        for name in ("weight", "bias")
    }
    return replace(state, round=state.round + 1, params={**state.params, **averaged})


def finish(context: RunContext, state: ServerState) -> Artifact:
    """The head, as it acts on embeddings."""
    params, scale = state.params, feature_scale(context, context.problem.dim)
    return head_artifact(context, params["weight"], params["bias"], params[CENTRE], scale)


METHOD = Method(
    name="fedavg",
    private=False,
    plan=nonprivate_plan,
    statistics=centre_statistics,
    init=init,
    prepare=with_centre,
    upload_shapes=upload_shapes,
    client_step=client_step,
    server_step=server_step,
    finish=finish,
)
