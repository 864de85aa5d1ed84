"""FedLambda: FedAvg's head mixed at each site with the site's own, λ softmax(local) + (1 - λ) softmax(global).

One λ from the grid 0, 0.1 ... 1 serves all sites, by the mean over sites of the accuracy on records that the local head
of the choice did not see: an uncharged release. Not private.

Adapted from kNN-Per, Marfoq et al. (2022), Eq. 8. Departs from it: a linear head in place of the neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from common.evaluation.heads import LinearHead, fit_linear_head
from common.evaluation.scores import MIXING_GRID, mix_probabilities, score
from common.methods.base import Artifact, Method, RunContext, ServerState, Shapes, SiteState, StepInput, Tensors, seeded
from common.methods.constants import CENTRE
from common.methods.features import head_features
from common.methods.heads import fedavg
from common.methods.heads.linear import centre_statistics, with_centre
from common.methods.plans import nonprivate_plan

_HELD_OUT = 0.2


def upload_shapes(context: RunContext) -> Shapes:
    """FedAvg's, and the accuracy at every λ of the grid (zeros before the last round)."""
    return {**fedavg.upload_shapes(context), "accuracies": (len(MIXING_GRID),)}


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """FedAvg's local epochs; in the last round the site fits its own head too, and scores the grid of λ.

    The grid is scored on a fifth of the records, with a head fitted on the rest; the head that stays at the site is
    fitted on all of them.
    """
    uploads = fedavg.local_head(context, work, 0.0)
    uploads["accuracies"] = torch.zeros(len(MIXING_GRID))
    if work.round_index + 1 < context.plan.num_rounds or work.data.labels.shape[0] == 0:
        return work.site, uploads
    features = head_features(context, work.data.embeddings, work.params[CENTRE])
    labels, num_classes = work.data.labels, context.problem.num_classes
    order = torch.randperm(
        labels.shape[0], generator=seeded("held out", context.config.federation.seed, work.site_index)
    )
    cut = int(_HELD_OUT * order.numel())
    held_out, rest = order[:cut], order[cut:]
    if held_out.numel() > 0:
        head = fit_linear_head(features[rest], labels[rest], num_classes)
        received = LinearHead(work.params["weight"], work.params["bias"], findings=context.problem.findings)
        local, shared = head.probabilities(features[held_out]), received.probabilities(features[held_out])
        mixed = [mix_probabilities(local, shared, mix) for mix in MIXING_GRID]
        scores = [score(chances, features[held_out], labels[held_out]).accuracy for chances in mixed]
        uploads["accuracies"] = torch.tensor(scores)
    own = fit_linear_head(features, labels, num_classes)
    return SiteState({"weight": own.weight, "bias": own.bias}), uploads


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """FedAvg's average, and the λ with the best mean accuracy over sites; of equals, the smallest."""
    after = fedavg.server_step(context, state, uploads)
    merit = torch.stack([uploads[site]["accuracies"] for site in sorted(uploads)]).mean(0)
    return replace(after, memory={"mixing": torch.tensor(MIXING_GRID[int(merit.argmax())])})


def finish(context: RunContext, state: ServerState) -> Artifact:
    """FedAvg's head, with λ among the settings."""
    artifact = fedavg.finish(context, state)
    mixing = float(state.memory["mixing"]) if "mixing" in state.memory else 0.0
    return replace(artifact, settings={**artifact.settings, "mixing": mixing})


METHOD = Method(
    name="fedlambda",
    private=False,
    plan=nonprivate_plan,
    statistics=centre_statistics,
    init=fedavg.init,
    prepare=with_centre,
    upload_shapes=upload_shapes,
    client_step=client_step,
    server_step=server_step,
    finish=finish,
)
