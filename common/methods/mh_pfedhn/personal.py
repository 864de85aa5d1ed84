"""MH-pFedHN: a multi-head hypernetwork at the server makes whole models for sites whose models differ.

Source: arXiv 2507.22330. A site tells the server no more than how many parameters its model has. It trains the model
that it gets on its records and sends Δ = θ - θ̃; the server pulls the Δ of all sites back through the hypernetwork and
takes one step of Adam a round. Nothing is private.

Departs from the paper: one step a round for all sites instead of one a site; records are centred by the released mean
where all sites' embeddings have one width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from common.adam import adam_step
from common.errors import ConfigError
from common.findings import are_findings, label_losses
from common.methods.base import (
    Artifact,
    Method,
    RunContext,
    ServerState,
    Shapes,
    SiteState,
    StepInput,
    Tensors,
    seeded,
)
from common.methods.constants import CENTRE
from common.methods.features import head_features
from common.methods.generators.dp_network import with_prefix
from common.methods.heads.linear import centre_statistics, with_centre
from common.methods.mh_pfedhn.architectures import Architecture, site_architecture
from common.methods.mh_pfedhn.chunks import chunks_of, clip_joint_norm, generate_model, init_chunks, pull_back
from common.methods.plans import nonprivate_plan
from common.records import SiteData

_NETWORK = ("body.", "head.", "embedding.")


def model_sizes(context: RunContext) -> dict[str, int]:
    """Number of parameters of every site's model, by the site's index in words."""
    return {str(site): site_architecture(context, site).size for site in range(context.problem.num_sites)}


def init(context: RunContext) -> ServerState:
    """The hypernetwork with one set of embeddings a site, from the run's seed."""
    generator = seeded("chunks", context.config.federation.seed)
    params = init_chunks(model_sizes(context), context.config.rivals, generator)
    return ServerState(0, {**params, CENTRE: torch.zeros(context.problem.dim)})


def broadcast(context: RunContext, state: ServerState, site_index: int) -> Tensors:
    """The site's generated model and the centre; nothing of the hypernetwork, nor of other sites' models."""
    return {"theta": site_model(context, state.params, site_index), CENTRE: state.params[CENTRE]}


def receives(context: RunContext, site_index: int) -> Shapes:
    """As `broadcast`."""
    return {"theta": (site_architecture(context, site_index).size,), CENTRE: (context.problem.dim,)}


def site_model(context: RunContext, params: Tensors, site_index: int) -> Tensor:
    """The model that the hypernetwork makes for a site, (K_i,)."""
    size = site_architecture(context, site_index).size
    return generate_model(params, params[f"embedding.{site_index}"], size)


def site_upload_shapes(context: RunContext, site_index: int) -> Shapes:
    """Δ, as long as the site's model."""
    return {"delta": (site_architecture(context, site_index).size,)}


def upload_shapes(context: RunContext) -> Shapes:
    """What the first site sends; see `site_upload_shapes`."""
    return site_upload_shapes(context, 0)


def features_at(context: RunContext, embeddings: Tensor, centre: Tensor, site_index: int) -> Tensor:
    """Embeddings as a site's model sees them; not centred where the sites' widths differ."""
    wanted = centre if not context.problem.site_dims else torch.zeros(context.problem.dim_of(site_index))
    return head_features(context, embeddings, wanted)


def personal_scores(context: RunContext, received: Tensors, embeddings: Tensor, site_index: int) -> Tensor:
    """Class scores (n, K) of the model that a site received, for embeddings (n, d) of its own encoder."""
    features = features_at(context, embeddings, received[CENTRE], site_index)
    return site_architecture(context, site_index).logits(received["theta"], features)


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """Train the received model on the site's records; send what it moved. Without noise."""
    return work.site, {"delta": work.params["theta"] - trained_model(context, work)}


def trained_model(context: RunContext, work: StepInput, teacher: Tensor | None = None) -> Tensor:
    """θ̃: the received model after the site's local epochs.

    Args:
        context: the run.
        work: the round's work.
        teacher: (n, K) class scores to learn from beside the labels, or None.
    """
    architecture = site_architecture(context, work.site_index)
    features = features_at(context, work.data.embeddings, work.params[CENTRE], work.site_index)
    order = seeded("order", context.config.federation.seed, work.site_index, work.round_index)
    return train_model(context, architecture, work.params["theta"], features, work.data.labels, order, teacher)


def train_model(
    context: RunContext,
    architecture: Architecture,
    theta: Tensor,
    features: Tensor,
    labels: Tensor,
    order: torch.Generator,
    teacher: Tensor | None = None,
) -> Tensor:
    """Local epochs of SGD with momentum and weight decay, from θ: (size,) -> (size,).

    With a teacher the loss of a record is a T² KL(teacher || model) at temperature T, plus (1 - a) cross-entropy.
    """
    settings = context.config.rivals
    current = theta.detach().clone()
    velocity = torch.zeros_like(current)
    for _ in range(settings.local_epochs):
        for rows in torch.split(torch.randperm(labels.shape[0], generator=order), settings.local_batch_size):
            if rows.numel() == 0:
                continue
            leaf = current.detach().requires_grad_()
            scores = architecture.logits(leaf, features[rows])
            loss = label_losses(scores, labels[rows]).mean()
            if teacher is not None:
                temperature, weight = settings.teacher_temperature, settings.teacher_weight
                divergence = taught_loss(scores / temperature, teacher[rows] / temperature, labels[rows])
                loss = weight * temperature * temperature * divergence + (1 - weight) * loss
            (gradient,) = torch.autograd.grad(loss, leaf)
            velocity = settings.local_momentum * velocity + gradient + settings.local_decay * current
            current = current - settings.local_rate * velocity
    return current


def taught_loss(scores: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || model), mean over records: of the softmax, or the sum over known findings' sigmoids.

    Args:
        scores: (n, K). teacher: (n, K). labels: (n,) or (n, K), which tell which findings are known.
    """
    if are_findings(labels):
        soft = torch.sigmoid(teacher)
        apart = [functional.binary_cross_entropy_with_logits(x, soft, reduction="none") for x in (scores, teacher)]
        return ((apart[0] - apart[1]) * (labels >= 0)).sum(1).mean()
    wanted = torch.log_softmax(teacher, 1)
    return functional.kl_div(torch.log_softmax(scores, 1), wanted, reduction="batchmean", log_target=True)


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """Pull all Δ back through the hypernetwork and take one step of Adam."""
    changes = {str(site): uploads[site]["delta"] / len(uploads) for site in sorted(uploads)}
    return hyper_step(context, state, model_sizes(context), changes)


def hyper_step(context: RunContext, state: ServerState, sizes: Mapping[str, int], changes: Tensors) -> ServerState:
    """One step of Adam on the hypernetwork against the pulled-back changes, their joint norm bounded."""
    settings = context.config.rivals
    network = with_prefix(state.params, *_NETWORK)
    gradients = clip_joint_norm(pull_back(network, sizes, changes), settings.hyper_gradient_norm)
    stepped, moments = adam_step(network, gradients, state.memory, settings.hyper_rate)
    return replace(state, round=state.round + 1, params={**state.params, **stepped}, memory=moments)


def finish(context: RunContext, state: ServerState) -> Artifact:
    """The hypernetwork: it makes a model for every site, and for one that joins."""
    problem = context.problem
    settings: dict[str, str | int | float | bool] = {
        "dim": problem.dim,
        "num_classes": problem.num_classes,
        "architectures": context.config.rivals.architectures,
        "chunk_size": context.config.rivals.chunk_size,
    }
    return Artifact("hypernetwork", dict(state.params), settings)


def join(
    context: RunContext, artifact: Artifact, data: SiteData, architecture: Architecture, steps: int = 300
) -> tuple[Tensor, Tensor]:
    """A new site after training: fit its own embeddings alone, with body and heads frozen.

    Reads the site's records without noise: embeddings, model and scores stay at the site.

    Args:
        context: the run that made the hypernetwork.
        artifact: what it published.
        data: the new site's records.
        architecture: the new site's model; models with so many chunks must have been in the run.
        steps: steps of Adam on all records, rate 0.01, from the mean of the run's embeddings for such models.

    Returns:
        The embeddings (chunks, 64) and the generated model (size,).

    Raises:
        ConfigError: "the hypernetwork has no head for models of ... chunks".
    """
    params, chunks = artifact.tensors, chunks_of(architecture.size, context.config.rivals)
    known = [value for name, value in params.items() if name.startswith("embedding.") and value.shape[0] == chunks]
    if not known:
        raise ConfigError(f"the hypernetwork has no head for models of {chunks} chunks: choose a model of another size")
    shared = context.problem.site_dims == () and architecture.dim == context.problem.dim
    centre = params[CENTRE] if shared else torch.zeros(architecture.dim)
    features = head_features(context, data.embeddings, centre)
    moments: dict[str, Tensor] = {}
    fitted = {"embedding": torch.stack(known).mean(0)}
    for _ in range(steps):
        leaf = fitted["embedding"].detach().clone().requires_grad_()
        scores = architecture.logits(generate_model(params, leaf, architecture.size), features)
        (gradient,) = torch.autograd.grad(label_losses(scores, data.labels).mean(), leaf)
        fitted, moments = adam_step(fitted, {"embedding": gradient}, moments, 0.01)
    return fitted["embedding"], generate_model(params, fitted["embedding"], architecture.size)


METHOD = Method(
    name="mh_pfedhn",
    private=False,
    plan=nonprivate_plan,
    statistics=centre_statistics,
    init=init,
    prepare=with_centre,
    upload_shapes=upload_shapes,
    client_step=client_step,
    server_step=server_step,
    finish=finish,
    broadcast=broadcast,
    receives=receives,
    site_upload_shapes=site_upload_shapes,
    personal_scores=personal_scores,
    uploads_sums=False,
)
