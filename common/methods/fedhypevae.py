"""FedHypeVAE: a conditional VAE whose decoder and class priors a shared hypernetwork generates from private codes.

Gupta, Jangid & Sethi (2026), arXiv 2601.00785, Algorithm 1. What differs from the paper, and why, is in
docs of `clipping`, `cvae.sleep`, `statistics` and `synthesis`: as printed its guarantee does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from common.clipping import clipped_gradient_sum
from common.cvae import PlainLayers, encode, gaussian_kl, gaussian_log_likelihood, init_encoder_params, sleep
from common.hypernetwork import (
    GeneratorShape,
    class_prior,
    code_features,
    decode,
    init_code,
    init_hypernet_params,
    project_code,
    project_spectral_norms,
)
from common.kernels import fourier_frequencies
from common.methods.base import (
    Artifact,
    Method,
    RunContext,
    ServerState,
    Shapes,
    SiteState,
    StepInput,
    Tensors,
    private_plan,
    seeded,
)
from common.noise import NoiseSource, add_gaussian
from common.objective import FeatureTarget, data_free_loss, record_losses
from common.sampling import UnitBatch, by_unit, draw_units, on_sphere
from common.statistics import ReleasedStatistics, StatisticsSpec, clip_to_ball
from common.synthesis import MetaCodes, fit_meta_codes, sample_embeddings
from common.tape import GradientFactors, Tape

_CENTRE, _TARGET, _TOTAL = "constant.centre", "constant.target", "constant.total"
_SLEEP_BATCH = 256


def generator_shape(context: RunContext) -> GeneratorShape:
    """Public sizes of the run's generator."""
    config = context.config
    return GeneratorShape.of(context.problem.dim, context.problem.num_classes, config.model, config.training)


def normalised(context: RunContext, embeddings: Tensor, centre: Tensor) -> Tensor:
    """Embeddings as the generator sees them: on the unit sphere, around the centre, clipped; row by row."""
    training = context.config.training
    if training.sphere:
        embeddings = on_sphere(embeddings)
    return clip_to_ball(embeddings - centre, training.feature_norm)


def statistics_spec(context: RunContext) -> StatisticsSpec | None:
    """Class counts, class sums and the total sum; Fourier features too where MMD is against the release."""
    if context.plan.statistics_noise is None:
        return None
    training, problem = context.config.training, context.problem
    frequencies = _frequencies(context) if training.mmd == "released" else None
    return StatisticsSpec(
        problem.dim,
        problem.num_classes,
        1.0 if training.sphere else training.embedding_radius,
        moment_weight=1.0 if context.config.synthesis.covariance_weight > 0 else 0.0,
        feature_weight=1.0 if frequencies is not None else 0.0,
        frequencies=frequencies,
    )


def init(context: RunContext) -> ServerState:
    """Φ from the run's seed, before any data."""
    shape = generator_shape(context)
    params = init_hypernet_params(shape, seeded("hypernet", context.config.federation.seed))
    params[_CENTRE] = torch.zeros(shape.dim)
    return ServerState(0, params)


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
    params[_TOTAL] = torch.tensor(statistics.total)
    if context.config.training.centre:
        params[_CENTRE] = statistics.centre
    if context.config.training.mmd == "released" and statistics.class_features is not None:
        shares = statistics.class_counts / statistics.class_counts.sum()
        params[_TARGET] = torch.cat([statistics.class_features, shares[:, None]], 1)
    return replace(state, params=params, statistics=statistics)


def upload_shapes(context: RunContext) -> Shapes:
    """Gradient sums of the trained part of Φ; nothing of the code or the encoder leaves."""
    params = init(context).params
    return {name: tuple(params[name].shape) for name in _trained(context, params)}


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """One round at a site (Algorithm 1, lines 3-9).

    Each local step draws units, clips each unit's gradient of (Φ, code) as one vector to C, adds Gaussian noise of
    standard deviation σ C, and moves the code by its part of the noised sum. The Φ parts of all steps are summed.

    Returns:
        The new private state, and the noised sums: `count = local_steps` sampled Gaussian events with multiplier σ,
        for adding or removing one unit. The data-free terms' gradient is added after the noise.
    """
    config, shape = context.config, generator_shape(context)
    training, privacy = config.training, config.privacy
    seed = config.federation.seed
    data = by_unit(work.data, privacy.unit)
    data = replace(data, embeddings=normalised(context, data.embeddings, work.params[_CENTRE]))
    params, site = dict(work.params), dict(work.site.tensors)
    encoder = {name: value for name, value in site.items() if name.startswith("encoder.")}
    trained = _trained(context, params)
    scale = _step_scale(context, work.params)
    # records' gradients are summed in units of C over about q N / m units: terms without records must weigh the same
    free_scale = scale / _clip_unit(context)
    uploads: dict[str, Tensor] = {name: torch.zeros_like(params[name]) for name in trained}
    if privacy.encoder_training == "sleep" and training.elbo_weight > 0:
        encoder = sleep(
            shape,
            params,
            site.get("code"),
            encoder,
            steps=training.sleep_steps,
            rate=training.encoder_rate,
            batch_size=_SLEEP_BATCH,
            generator=seeded("sleep", seed, work.site_index, work.round_index),
        )
    for step in range(training.local_steps):
        # public numbers for what reads no record; whatever meets a record is drawn from the secret source
        public = seeded("free", seed, work.site_index, work.round_index, step)
        batch = draw_units(data, privacy.sampling_rate, privacy.records_per_unit, work.source)
        noisy = _noised_sum(context, params, site.get("code"), encoder, batch, work.source)
        raw = _raw_gradients(context, params, site.get("code"), encoder, batch, public)
        free = _data_free_gradients(context, params, site.get("code"), public)
        total = {name: value + free_scale * free[name] if name in free else value for name, value in noisy.items()}
        for name in trained:
            uploads[name] = uploads[name] + total[name]
        if "code" in site:
            step_code = raw["code"] if "code" in raw else total["code"] / scale
            site["code"] = project_code(site["code"] - training.code_rate * step_code, training.code_radius)
        for name in encoder:
            if name in raw or name in total:
                move = raw[name] if name in raw else total[name] / scale
                encoder[name] = encoder[name] - training.encoder_rate * move
        if training.local_steps > 1:
            for name in trained:
                params[name] = params[name] - _rate(context, name) * total[name] / scale
    return SiteState({**site, **encoder}), uploads


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """Add the sites' noised sums and step Φ (Eq. 10), with momentum and averaged iterates.

    The sum over sites of noised sums is, over q N, the n_i-weighted average of Eqs. 9-10, and no site tells its n_i.
    Several local steps count as so many steps: with one site and no momentum, Φ moves as it moved at the site.
    """
    training = context.config.training
    params, memory = dict(state.params), dict(state.memory)
    share = len(uploads) / context.problem.num_sites
    scale = _step_scale(context, params) * context.problem.num_sites * share
    started = training.num_rounds - round(training.averaging_fraction * training.num_rounds)
    averaging = state.round >= min(started, training.num_rounds - 1)
    for name in _trained(context, params):
        gradient = torch.stack([uploads[site][name] for site in sorted(uploads)]).sum(0) / scale
        velocity = training.momentum * memory.get(f"velocity.{name}", torch.zeros_like(gradient)) + gradient
        memory[f"velocity.{name}"] = velocity
        params[name] = params[name] - _rate(context, name) * velocity
    params = project_spectral_norms(params, training.lipschitz_bound)
    if averaging:
        for name in _trained(context, params):
            memory[f"sum.{name}"] = memory.get(f"sum.{name}", torch.zeros_like(params[name])) + params[name]
        memory["averaged"] = memory.get("averaged", torch.zeros(())) + 1.0
    return replace(state, round=state.round + 1, params=params, memory=memory)


def finish(context: RunContext, state: ServerState) -> Artifact:
    """Average the last iterates, fit the meta-codes, and bundle the generator (Algorithm 1, line 13)."""
    config, shape = context.config, generator_shape(context)
    params = dict(state.params)
    if "averaged" in state.memory:
        for name in _trained(context, params):
            params[name] = state.memory[f"sum.{name}"] / state.memory["averaged"]
    meta = fit_meta_codes(
        shape,
        params,
        state.statistics,
        num_codes=config.synthesis.num_codes,
        radius=config.training.code_radius,
        covariance_weight=config.synthesis.covariance_weight,
        steps=config.synthesis.meta_steps,
        generator=seeded("meta", config.federation.seed),
    )
    tensors = {name: value for name, value in params.items() if name != _TARGET}
    tensors |= {"meta.codes": meta.codes, "meta.weights": meta.weights}
    if state.statistics is not None:
        tensors["class_counts"] = state.statistics.class_counts
    settings = {
        "dim": shape.dim,
        "num_classes": shape.num_classes,
        "sphere": config.training.sphere,
        "observation_variance": shape.observation_variance,
    }
    return Artifact("generator", tensors, settings)


def sample(context: RunContext, artifact: Artifact, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draw synthetic embeddings with the wanted labels: (n,) -> (n, d_x), (n,). Post-processing."""
    synthesis = context.config.synthesis
    embeddings, drawn = sample_embeddings(
        generator_shape(context),
        artifact.tensors,
        MetaCodes(artifact.tensors["meta.codes"], artifact.tensors["meta.weights"]),
        labels,
        seeded("synthesis", seed),
        mixture=synthesis.mixture,
        latent_law=synthesis.latent_law,
        relabel=synthesis.relabel,
        temperature=synthesis.relabel_temperature,
    )
    return embeddings + artifact.tensors[_CENTRE], drawn


def _trained(context: RunContext, params: Tensors) -> list[str]:
    """Names of Φ that records train; what gets no gradient gets no noise either."""
    training = context.config.training
    names = [name for name in params if not name.startswith("constant.")]
    if training.elbo_weight > 0 or training.mmd == "per-example":
        return names if training.discriminative_weight > 0 else [n for n in names if not n.startswith("class_")]
    output = generator_shape(context).output_layer
    kept = (f"{output}.class_weight", f"{output}.row_scale", "class_bias.", "class_shift.", "trunk.")
    return [name for name in names if name.startswith(kept)]


def _rate(context: RunContext, name: str) -> float:
    training = context.config.training
    scores = name.endswith(".class_weight") or name.startswith(("class_bias.", "class_shift."))
    return training.learning_rate if scores else training.generator_rate


def _step_scale(context: RunContext, params: Tensors) -> float:
    """C q N / m: what a site's sum is divided by, from public and released numbers alone."""
    privacy, federation = context.config.privacy, context.config.federation
    total = float(params[_TOTAL]) if _TOTAL in params else float(federation.public_total)
    return _clip_unit(context) * privacy.sampling_rate * max(total, 1.0) / context.problem.num_sites


def _clip_unit(context: RunContext) -> float:
    """C, or 1 where nothing is clipped: rates act on gradients in units of it."""
    clip = context.config.privacy.clip_norm
    return clip if math.isfinite(clip) else 1.0


def _noised_sum(
    context: RunContext,
    params: Tensors,
    code: Tensor | None,
    encoder: Tensors,
    batch: UnitBatch,
    source: NoiseSource,
) -> dict[str, Tensor]:
    """Clip every unit's gradient as one vector, add up, add noise: the only data-dependent values that are kept."""
    config, shape = context.config, generator_shape(context)
    mode = config.privacy.encoder_training
    joint = mode == "joint" and config.training.elbo_weight > 0
    shapes = {name: params[name].shape for name in _trained(context, params)}
    if joint:
        shapes |= {name: value.shape for name, value in encoder.items()}
    if code is not None and mode != "unprotected":
        shapes["code"] = code.shape
    factors = GradientFactors()
    if batch.labels.shape[0] > 0:
        tape = Tape({**params, **encoder} if joint else params, code, batch.labels.shape[0])
        losses = record_losses(
            shape,
            config.training,
            tape,
            tape if joint else PlainLayers(encoder),
            batch.embeddings,
            batch.labels,
            batch.mask,
            source,
        )
        factors = tape.factors(losses)
        if mode == "unprotected":
            factors.vectors.pop("code", None)
    summed = clipped_gradient_sum(factors, shapes, config.privacy.clip_norm)
    noise = context.plan.training_noise or 0.0
    return add_gaussian(summed.tensors, noise * summed.sensitivity if noise > 0 else 0.0, source)


def _raw_gradients(
    context: RunContext,
    params: Tensors,
    code: Tensor | None,
    encoder: Tensors,
    batch: UnitBatch,
    draws: torch.Generator,
) -> dict[str, Tensor]:
    """Eq. 8 as printed: unclipped, unnoised gradients of code and encoder. Only under `unprotected`."""
    training = context.config.training
    if context.config.privacy.encoder_training != "unprotected" or not bool(batch.mask.any()):
        return {}
    shape = generator_shape(context)
    keep = batch.mask.flatten() > 0
    embeddings = batch.embeddings.flatten(0, 1)[keep]
    one_hot = functional.one_hot(batch.labels.flatten()[keep], shape.num_classes).float()
    leaves = {name: value.clone().requires_grad_() for name, value in encoder.items()}
    if code is not None:
        leaves["code"] = code.clone().requires_grad_()
    code_leaf = leaves.get("code")
    latent = torch.zeros(embeddings.shape[0], 0)
    divergence = torch.zeros(embeddings.shape[0])
    if shape.model.latent_dim:
        mean, log_scale = encode(shape, PlainLayers(leaves), embeddings, one_hot)
        latent = mean + torch.exp(log_scale) * torch.randn(mean.shape, generator=draws)
        prior_mean, prior_log_scale = class_prior(params, code_leaf, one_hot)
        divergence = gaussian_kl(mean, log_scale, prior_mean, prior_log_scale)
    reconstruction = decode(shape, params, code_features(params, code_leaf), latent, one_hot)
    elbo = gaussian_log_likelihood(embeddings, reconstruction, shape.observation_variance) - divergence
    loss = -elbo.mean() / shape.dim
    if code_leaf is not None:
        loss = loss + training.code_penalty * code_leaf.square().sum()
    if not leaves:
        return {}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def _data_free_gradients(
    context: RunContext, params: Tensors, code: Tensor | None, draws: torch.Generator
) -> dict[str, Tensor]:
    """Gradient of the terms that read no record, by name; empty where there are none."""
    shape, training = generator_shape(context), context.config.training
    leaves = {name: params[name].detach().clone().requires_grad_() for name in _trained(context, params)}
    if code is not None:
        leaves["code"] = code.clone().requires_grad_()
    target = None
    if _TARGET in params:
        packed = params[_TARGET]
        shares = packed[:, -1].clamp(min=0.0)
        target = FeatureTarget(_frequencies(context), packed[:, :-1], shares / shares.sum().clamp(min=1e-12))
    loss = data_free_loss(shape, training, {**params, **leaves}, leaves.get("code"), target, draws)
    if not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def _frequencies(context: RunContext) -> Tensor:
    training, seed = context.config.training, context.config.federation.seed
    return fourier_frequencies(context.problem.dim, training.mmd_features, training.bandwidths, seed)


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
    sample=sample,
)
