"""FedHypeVAE: a conditional VAE whose decoder and class priors a shared hypernetwork generates from private codes.

Gupta, Jangid & Sethi (2026), arXiv 2601.00785, Algorithm 1. What differs from the paper, and why, is in
the docs of `privacy.clipping`, `generator.cvae.sleep`, `privacy.statistics` and `generator.meta_code`: as printed its
guarantee does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from common.generator.cvae import init_encoder_params
from common.generator.hypernetwork import init_code, init_hypernet_params, project_spectral_norms
from common.generator.meta_code import MetaCodes, fit_meta_codes
from common.generator.placement import PLACEMENT, place_classes
from common.generator.prototypes import PROTOTYPES, class_prototypes
from common.generator.row_law import RowLaw
from common.generator.rows import PROTOTYPE_SHARE, PROTOTYPE_SPREAD, RowSettings, generator_law
from common.methods.base import Artifact, Method, RunContext, ServerState, Shapes, SiteState, Tensors, seeded
from common.methods.constants import CENTRE, TARGET, TOTAL
from common.methods.fedhypevae.presence import presence_weights
from common.methods.fedhypevae.rates import (
    CLASS_OFFSETS,
    PRESENCE,
    class_offsets,
    finding_offsets,
    generator_shape,
    rate_of,
    step_scale,
    trained_names,
    weighs_presence,
)
from common.methods.fedhypevae.site import client_step
from common.methods.labels import for_task, label_tensors, labelled, with_label_offsets
from common.methods.plans import private_plan
from common.methods.uploads import summed
from common.privacy.combined import ReleasedStatistics
from common.privacy.statistics import TRAINING_COUNT_WEIGHT, StatisticsSpec


def statistics_spec(context: RunContext) -> StatisticsSpec | None:
    """Class counts, class sums and the total sum; Fourier features too where MMD is against the release."""
    if context.plan.statistics_noise is None:
        return None
    training, problem = context.config.training, context.problem
    frequencies = None
    if training.mmd == "released":
        from common.generator.mmd import public_frequencies

        frequencies = public_frequencies(problem.dim, context.config.federation.seed)
    spec = StatisticsSpec(
        problem.dim,
        problem.num_classes,
        count_weight=TRAINING_COUNT_WEIGHT,
        moment_weight=1.0 if context.config.synthesis.covariance_weight > 0 else 0.0,
        feature_weight=1.0 if frequencies is not None else 0.0,
        frequencies=frequencies,
    )
    return for_task(context, spec)


def init(context: RunContext) -> ServerState:
    """Φ from the run's seed, before any data."""
    shape = generator_shape(context)
    params = init_hypernet_params(shape, seeded("hypernet", context.config.federation.seed))
    params[CENTRE] = torch.zeros(shape.dim)
    return ServerState(0, params)


def receives(context: RunContext, site_index: int) -> Shapes:
    """Φ, the centre, and what `prepare` adds."""
    shapes: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in init(context).params.items()}
    spec = statistics_spec(context)
    if spec is not None:
        shapes[TOTAL] = ()
        if context.config.training.logit_adjustment > 0:
            shapes[CLASS_OFFSETS] = (spec.num_classes,)
        if spec.frequencies is not None:
            shapes[TARGET] = (spec.num_classes, 2 * spec.frequencies.shape[0] + 1)
    return shapes


def init_site(context: RunContext, site_index: int) -> SiteState:
    """A site's code and encoder; both are drawn from public randomness, before any data."""
    shape, seed = generator_shape(context), context.config.federation.seed
    generator = seeded("site", seed, site_index)
    tensors = init_encoder_params(shape, generator)
    if shape.model.code_dim:
        tensors["code"] = init_code(shape, context.config.training.code_radius, generator)
    return SiteState(tensors)


def prepare(context: RunContext, state: ServerState, statistics: ReleasedStatistics) -> ServerState:
    """Take the noised centre, and the target of the released MMD, into what the sites receive."""
    params = dict(state.params)
    params[TOTAL] = torch.tensor(statistics.total)
    params[CENTRE] = statistics.centre
    if context.config.training.logit_adjustment > 0:
        if statistics.prevalence is None:
            params[CLASS_OFFSETS] = class_offsets(context, statistics.class_shares)
        else:
            params[CLASS_OFFSETS] = finding_offsets(context, statistics.prevalence)
    if context.config.training.mmd == "released":
        from common.generator.mmd import pack_target

        params[TARGET] = pack_target(statistics)
    memory = dict(state.memory)
    if weighs_presence(context) and statistics.site_counts is not None and statistics.site_indices is not None:
        noise = statistics.noise_std["class_counts"] / len(statistics.site_counts) ** 0.5
        weights = torch.ones(context.problem.num_sites, context.problem.num_classes)
        weights[statistics.site_indices] = presence_weights(statistics.site_counts, noise)
        memory[PRESENCE] = weights
    return replace(state, params=params, memory=memory, statistics=statistics)


def upload_weights(context: RunContext, state: ServerState) -> dict[str, Tensor]:
    """Weights of the sites' sums for what belongs to single classes; nothing where sites count alike."""
    if PRESENCE not in state.memory:
        return {}
    weights, output = state.memory[PRESENCE], generator_shape(context).output_layer
    return {
        f"{output}.class_weight": weights[:, None],
        "class_bias.weight": weights,
        "class_shift.weight": weights[:, :, None],
    }


def upload_shapes(context: RunContext) -> Shapes:
    """Gradient sums of the trained part of Φ; nothing of the code or the encoder leaves."""
    params = init(context).params
    return {name: tuple(params[name].shape) for name in trained_names(context, params)}


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """Add the sites' noised sums and step Φ (Eq. 10), with momentum and averaged iterates.

    The sum over sites of noised sums is, over q N, the n_i-weighted average of Eqs. 9-10, and no site tells its n_i.
    Several local steps count as so many steps: with one site and no momentum, Φ moves as it moved at the site.
    """
    training = context.config.training
    params, memory = dict(state.params), dict(state.memory)
    share = len(uploads) / context.problem.num_sites
    scale = step_scale(context, params) * context.problem.num_sites * share
    started = training.num_rounds - round(training.averaging_fraction * training.num_rounds)
    averaging = state.round >= min(started, training.num_rounds - 1)
    for name in trained_names(context, params):
        gradient = summed(uploads, name) / scale
        # Eq. (10): no n_i is known, and the sum of sums over q N is the mean that n_i would weigh
        velocity = training.momentum * memory.get(f"velocity.{name}", torch.zeros_like(gradient)) + gradient
        memory[f"velocity.{name}"] = velocity
        params[name] = params[name] - rate_of(context, name, params) * velocity
    params = project_spectral_norms(params, training.lipschitz_bound)
    if averaging:
        for name in trained_names(context, params):
            memory[f"sum.{name}"] = memory.get(f"sum.{name}", torch.zeros_like(params[name])) + params[name]
        memory["averaged"] = memory.get("averaged", torch.zeros(())) + 1.0
    return replace(state, round=state.round + 1, params=params, memory=memory)


def finish(context: RunContext, state: ServerState) -> Artifact:
    """Average the last iterates, fit the meta-codes, and bundle the generator (Algorithm 1, line 13)."""
    config, shape = context.config, generator_shape(context)
    params = dict(state.params)
    if "averaged" in state.memory:
        for name in trained_names(context, params):
            params[name] = state.memory[f"sum.{name}"] / state.memory["averaged"]
    meta = fit_meta_codes(
        shape,
        params,
        None if shape.findings else state.statistics,  # of records with a finding others have theirs too
        num_codes=config.synthesis.num_codes,
        radius=config.training.code_radius,
        covariance_weight=config.synthesis.covariance_weight,
        steps=config.synthesis.meta_steps,
        generator=seeded("meta", config.federation.seed),
    )
    tensors = {name: value for name, value in params.items() if name not in {TARGET, CLASS_OFFSETS}}
    tensors |= {"meta.codes": meta.codes, "meta.weights": meta.weights}
    settings = {
        "dim": shape.dim,
        "num_classes": shape.num_classes,
        "observation_variance": shape.observation_variance,
    }
    if shape.findings:
        tensors |= label_tensors(context, state.statistics)
        tensors = with_label_offsets(_law(context, tensors), tensors)
        return Artifact("generator", tensors, settings)
    if state.statistics is not None:
        tensors["class_counts"] = state.statistics.class_counts
    placement = place_classes(shape, params, meta, state.statistics)
    if placement is not None:
        tensors[PLACEMENT] = placement
    prototypes = class_prototypes(shape, params, meta, state.statistics)
    if prototypes is not None and config.synthesis.prototypes:
        tensors[PROTOTYPES] = prototypes
    return Artifact("generator", tensors, settings)


def law(context: RunContext, artifact: Artifact) -> RowLaw:
    """What synthetic rows are drawn from. Post-processing."""
    return labelled(_law(context, artifact.tensors), artifact.tensors)


def _law(context: RunContext, tensors: Tensors) -> RowLaw:
    synthesis = context.config.synthesis
    settings = RowSettings(
        printed=synthesis.printed_rows,
        unit_rows=synthesis.prototypes,
        prototype_share=PROTOTYPE_SHARE if synthesis.prototypes else 0.0,
        prototype_spread=PROTOTYPE_SPREAD if synthesis.prototypes else 0.0,
    )
    return generator_law(
        generator_shape(context),
        tensors,
        MetaCodes(tensors["meta.codes"], tensors["meta.weights"]),
        settings,
        centre=tensors[CENTRE],
        placement=tensors.get(PLACEMENT),
        prototypes=tensors.get(PROTOTYPES),
        task=context.problem.task,
    )


METHOD = Method(
    name="fedhypevae",
    private=True,
    plan=private_plan,
    statistics=statistics_spec,
    init=init,
    init_site=init_site,
    prepare=prepare,
    upload_shapes=upload_shapes,
    client_step=client_step,
    server_step=server_step,
    finish=finish,
    law=law,
    upload_weights=upload_weights,
    shares_noise=True,
    receives=receives,
)
