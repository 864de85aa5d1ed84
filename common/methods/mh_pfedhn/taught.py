"""MH-pFedHN-GD: MH-pFedHN with a light global model that teaches the sites' own models.

Source: arXiv 2507.22330. The light model is one more index of the hypernetwork. Sites train it too; its n_i-weighted
changes are pulled back in the same step. The global model as received teaches the personal one:
a T² KL + (1 - a) cross-entropy, a = 0.2, T = 15.

Sites whose encoders differ share no light model: there is one for each width of embeddings, among the sites that have
it.

As printed nothing is private. `mh_pfedhn_gd_dp` weights sites equally. It clips all that a site sends, the Δ of both
models, to C as one vector, and adds noise of standard deviation 2 σ C. Whatever a site's records are, this vector
lies in a ball of radius C, so that any two data sets, those that differ by one unit among them, change it by at most
2 C. The noise protects every record, and the whole of a site's data at once, from the server and all who see the
hypernetwork. It does not hide that the site takes part. Every round is charged as one Gaussian event. The vector is
as long as the models, and the noise grows with it: at small ε little is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods.base import (
    Artifact,
    Method,
    PrivacyPlan,
    RunContext,
    ServerState,
    Shapes,
    SiteState,
    StepInput,
    Tensors,
    seeded,
)
from common.methods.constants import CENTRE
from common.methods.features import feature_scale
from common.methods.heads.linear import centre_statistics, head_artifact, with_centre
from common.methods.mh_pfedhn import personal
from common.methods.mh_pfedhn.architectures import light_architecture
from common.methods.mh_pfedhn.chunks import generate_model, init_chunks
from common.methods.plans import nonprivate_plan, private_plan
from common.privacy.clipping import clipped_vector_sum
from common.privacy.mechanism import noised_sum
from common.records import of_known_class


def check_whole(config: RunConfig) -> None:
    """Refuse what would be charged as a sample of the records, or as several steps (ConfigError): Δ comes from all
    records at once."""
    if config.privacy.sampling_rate != 1.0 or config.training.local_steps != 1:
        raise ConfigError(
            "a clipped Δ comes from all records of a site, once a round: set sampling-rate to 1 and local-steps to 1, "
            f"found {config.privacy.sampling_rate} and {config.training.local_steps}"
        )


def dp_plan(config: RunConfig) -> PrivacyPlan:
    """One Gaussian event a round: all of a site's records take part, and one Δ leaves.

    Raises:
        ConfigError: as `check_whole`.
    """
    check_whole(config)
    return private_plan(config)


def light_name(dim: int) -> str:
    """Name of the light model for embeddings of one width."""
    return f"light-{dim}"


def model_sizes(context: RunContext) -> dict[str, int]:
    """Sizes of the sites' models and of the light ones."""
    sizes = personal.model_sizes(context)
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
    return {**personal.broadcast(context, state, site_index), "light": light}


def receives(context: RunContext, site_index: int) -> Shapes:
    """As `broadcast`."""
    light = light_architecture(context, context.problem.dim_of(site_index))
    return {**personal.receives(context, site_index), "light": (light.size,)}


def light_model(context: RunContext, params: Tensors, dim: int) -> Tensor:
    """The light global model for embeddings of width `dim`, as a flat vector."""
    return generate_model(params, params[f"embedding.{light_name(dim)}"], light_architecture(context, dim).size)


def site_upload_shapes(context: RunContext, site_index: int) -> Shapes:
    """The changes of both models, and n_i."""
    return {**dp_site_upload_shapes(context, site_index), "num_examples": (1,)}


def dp_site_upload_shapes(context: RunContext, site_index: int) -> Shapes:
    """The changes of both models; n_i stays at the site."""
    light = light_architecture(context, context.problem.dim_of(site_index))
    return {**personal.site_upload_shapes(context, site_index), "light_delta": (light.size,)}


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """Train the light model by the labels, and the site's own by labels and the light model as received."""
    count = torch.tensor([float(work.data.labels.shape[0])])
    return work.site, {**_changes(context, work), "num_examples": count}


def dp_client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """As `client_step` without n_i, both changes clipped as one vector and noised: one Gaussian event."""
    # a record of no class would end the step of all
    known = replace(work, data=of_known_class(work.data, context.problem.num_classes))
    return work.site, noised_uploads(context, work, _changes(context, known))


def noised_uploads(context: RunContext, work: StepInput, uploads: Tensors) -> dict[str, Tensor]:
    """Clip everything that a site sends as one vector to C, and add noise of standard deviation 2 σ C.

    Returns:
        The noised tensors: one Gaussian release with sensitivity 2 C, for any change of the site's records, and so
        for adding or removing one unit.
    """
    flat = torch.cat([uploads[name].flatten() for name in sorted(uploads)])[None]
    summed = clipped_vector_sum(flat, context.config.privacy.clip_norm)
    # two data sets, however unlike, give two vectors of a ball of radius C
    summed = replace(summed, sensitivity=2.0 * summed.sensitivity, neighbouring="any change of a site's records")
    noisy = noised_sum(summed, context.plan.training_noise, work.source)["sum"].float()
    parts = torch.split(noisy, [uploads[name].numel() for name in sorted(uploads)])
    return {name: part.view(uploads[name].shape) for name, part in zip(sorted(uploads), parts, strict=True)}


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """Pull the sites' changes, and the weighted mean of the light model's, back in one step."""
    sites = sorted(uploads)
    changes = {str(site): uploads[site]["delta"] / len(sites) for site in sites}
    for dim in {context.problem.dim_of(site) for site in sites}:
        group = [site for site in sites if context.problem.dim_of(site) == dim]
        counts = torch.cat([uploads[site].get("num_examples", torch.ones(1)) for site in group])
        sent = torch.stack([uploads[site]["light_delta"] for site in group])
        changes[light_name(dim)] = (counts / counts.sum().clamp(min=1.0)) @ sent
    return personal.hyper_step(context, state, model_sizes(context), changes)


def finish(context: RunContext, state: ServerState) -> Artifact:
    """The hypernetwork; and the light model as a head where all sites' embeddings have one width."""
    artifact = personal.finish(context, state)
    if context.problem.site_dims:
        return artifact
    dim = context.problem.dim
    weight, bias = light_architecture(context, dim).unpack(light_model(context, state.params, dim))
    head = head_artifact(context, weight, bias, state.params[CENTRE], feature_scale(context, dim))
    return replace(artifact, tensors={**artifact.tensors, **head.tensors})


def _changes(context: RunContext, work: StepInput) -> dict[str, Tensor]:
    settings = context.config.federation
    light = light_architecture(context, context.problem.dim_of(work.site_index))
    features = personal.features_at(context, work.data.embeddings, work.params[CENTRE], work.site_index)
    order = seeded("light", settings.seed, work.site_index, work.round_index)
    taught = personal.train_model(context, light, work.params["light"], features, work.data.labels, order)
    teacher = light.logits(work.params["light"], features)
    own = personal.trained_model(context, work, teacher)
    return {"delta": work.params["theta"] - own, "light_delta": work.params["light"] - taught}


METHOD = Method(
    name="mh_pfedhn_gd",
    private=False,
    plan=nonprivate_plan,
    statistics=centre_statistics,
    init=init,
    prepare=with_centre,
    upload_shapes=lambda context: site_upload_shapes(context, 0),
    client_step=client_step,
    server_step=server_step,
    finish=finish,
    broadcast=broadcast,
    receives=receives,
    site_upload_shapes=site_upload_shapes,
    personal_scores=personal.personal_scores,
    uploads_sums=False,
)
METHOD_DP = replace(
    METHOD,
    name="mh_pfedhn_gd_dp",
    private=True,
    plan=dp_plan,
    upload_shapes=lambda context: dp_site_upload_shapes(context, 0),
    client_step=dp_client_step,
    site_upload_shapes=dp_site_upload_shapes,
    check=check_whole,
)
