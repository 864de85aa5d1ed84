"""MH-pFedHN-GD: MH-pFedHN with a light global model that teaches the sites' own models.

Source: arXiv 2507.22330. The light model is one more index of the hypernetwork. Sites train it too; its n_i-weighted
changes are pulled back in the same step. The global model as received teaches the personal one:
a T² KL + (1 - a) cross-entropy, a = 0.2, T = 15.

Sites whose encoders differ share no light model: there is one for each width of embeddings, among the sites that have
it. `mh_pfedhn_gd_dp` clips and noises both changes as one vector and weights sites equally; see `mh_pfedhn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from common.methods.base import Artifact, RunContext, ServerState, Shapes, SiteState, StepInput, Tensors, seeded
from common.methods.constants import CENTRE
from common.methods.features import feature_scale
from common.methods.heads.linear import head_artifact
from common.methods.mh_pfedhn import personal as mh_pfedhn
from common.methods.mh_pfedhn.architectures import light_architecture
from common.methods.mh_pfedhn.chunks import generate_model, init_chunks


def light_name(dim: int) -> str:
    """Name of the light model for embeddings of one width."""
    return f"light-{dim}"


def model_sizes(context: RunContext) -> dict[str, int]:
    """Sizes of the sites' models and of the light ones."""
    sizes = mh_pfedhn.model_sizes(context)
    for site in range(context.problem.num_sites):
        dim = context.problem.dim_of(site)
        sizes[light_name(dim)] = light_architecture(context, dim).size
    return sizes


def init(context: RunContext) -> ServerState:
    """The hypernetwork with embeddings for every site and every light model, from the run's seed."""
    generator = seeded("chunks", context.config.federation.seed)
    params = init_chunks(model_sizes(context), context.config.rivals, generator)
    return ServerState(0, {**params, CENTRE: torch.zeros(context.problem.dim)})


def broadcast(context: RunContext, state: ServerState, site_index: int) -> Tensors:
    """The site's model, the light model of its width, and the centre."""
    light = light_model(context, state.params, context.problem.dim_of(site_index))
    return {**mh_pfedhn.broadcast(context, state, site_index), "light": light}


def receives(context: RunContext, site_index: int) -> Shapes:
    """As `broadcast`."""
    light = light_architecture(context, context.problem.dim_of(site_index))
    return {**mh_pfedhn.receives(context, site_index), "light": (light.size,)}


def light_model(context: RunContext, params: Tensors, dim: int) -> Tensor:
    """The light global model for embeddings of width `dim`, as a flat vector."""
    return generate_model(params, params[f"embedding.{light_name(dim)}"], light_architecture(context, dim).size)


def site_upload_shapes(context: RunContext, site_index: int) -> Shapes:
    """The changes of both models, and n_i."""
    return {**dp_site_upload_shapes(context, site_index), "num_examples": (1,)}


def dp_site_upload_shapes(context: RunContext, site_index: int) -> Shapes:
    """The changes of both models; n_i stays at the site."""
    light = light_architecture(context, context.problem.dim_of(site_index))
    return {**mh_pfedhn.site_upload_shapes(context, site_index), "light_delta": (light.size,)}


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """Train the light model by the labels, and the site's own by labels and the light model as received."""
    count = torch.tensor([float(work.data.labels.shape[0])])
    return work.site, {**_changes(context, work), "num_examples": count}


def dp_client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """As `client_step` without n_i, both changes clipped as one vector and noised: one Gaussian event."""
    return work.site, mh_pfedhn.noised_uploads(
        context, work, _changes(context, mh_pfedhn.with_known_classes(context, work))
    )


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """Pull the sites' changes, and the weighted mean of the light model's, back in one step."""
    sites = sorted(uploads)
    changes = {str(site): uploads[site]["delta"] / len(sites) for site in sites}
    for dim in {context.problem.dim_of(site) for site in sites}:
        group = [site for site in sites if context.problem.dim_of(site) == dim]
        counts = torch.cat([uploads[site].get("num_examples", torch.ones(1)) for site in group])
        sent = torch.stack([uploads[site]["light_delta"] for site in group])
        changes[light_name(dim)] = (counts / counts.sum().clamp(min=1.0)) @ sent
    return mh_pfedhn.hyper_step(context, state, model_sizes(context), changes)


def finish(context: RunContext, state: ServerState) -> Artifact:
    """The hypernetwork; and the light model as a head where all sites' embeddings have one width."""
    artifact = mh_pfedhn.finish(context, state)
    if context.problem.site_dims:
        return artifact
    dim = context.problem.dim
    weight, bias = light_architecture(context, dim).unpack(light_model(context, state.params, dim))
    head = head_artifact(context, weight, bias, state.params[CENTRE], feature_scale(context, dim))
    return replace(artifact, tensors={**artifact.tensors, **head.tensors})


def _changes(context: RunContext, work: StepInput) -> dict[str, Tensor]:
    settings = context.config.federation
    light = light_architecture(context, context.problem.dim_of(work.site_index))
    features = mh_pfedhn.features_at(context, work.data.embeddings, work.params[CENTRE], work.site_index)
    order = seeded("light", settings.seed, work.site_index, work.round_index)
    taught = mh_pfedhn.train_model(context, light, work.params["light"], features, work.data.labels, order)
    teacher = light.logits(work.params["light"], features)
    own = mh_pfedhn.trained_model(context, work, teacher)
    return {"delta": work.params["theta"] - own, "light_delta": work.params["light"] - taught}


METHOD = replace(
    mh_pfedhn.METHOD,
    name="mh_pfedhn_gd",
    init=init,
    upload_shapes=lambda context: site_upload_shapes(context, 0),
    client_step=client_step,
    server_step=server_step,
    finish=finish,
    broadcast=broadcast,
    receives=receives,
    site_upload_shapes=site_upload_shapes,
)
METHOD_DP = replace(
    METHOD,
    name="mh_pfedhn_gd_dp",
    private=True,
    plan=mh_pfedhn.dp_plan,
    upload_shapes=lambda context: dp_site_upload_shapes(context, 0),
    client_step=dp_client_step,
    site_upload_shapes=dp_site_upload_shapes,
    check=mh_pfedhn.check_whole,
)
