"""A site's part of FedHypeVAE (Algorithm 1, lines 3-9): the only code of the method that reads records."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.bounds import LARGEST_NORM, held_within
from common.errors import ConfigError
from common.generator.cvae import sleep
from common.generator.hypernetwork import project_code
from common.generator.objective import data_free_loss, record_factors, record_normals
from common.methods.base import RunContext, SiteState, StepInput, Tensors, seeded
from common.methods.constants import CENTRE, TARGET
from common.methods.features import normalised
from common.methods.fedhypevae.rates import (
    CLASS_OFFSETS,
    clip_unit,
    generator_shape,
    rate_of,
    step_scale,
    trained_names,
)
from common.privacy.ahead import drawn_ahead, numbers_in
from common.privacy.clipping import clipped_gradient_sum
from common.privacy.mechanism import noise_std, noised_sum
from common.privacy.noise import NoiseSource
from common.privacy.sampling import draw_units
from common.records import UnitBatch, by_unit
from common.secagg.quantise import ROUNDING_MARGIN

_SLEEP_BATCH = 256
# Of what is added to a noised sum without records: the sum of all local steps stays a float32.
_MOST_ADDED = 1e30


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """One round at a site (Algorithm 1, lines 3-9).

    Each local step draws units, clips each unit's gradient of (Φ, code) as one vector to C, adds Gaussian noise of
    standard deviation σ C, and moves the code by its part of the noised sum. The Φ parts of all steps are summed.

    Returns:
        The new private state, and the noised sums: `count = local_steps` sampled Gaussian events with multiplier σ,
        for adding or removing one unit. The data-free terms' gradient is added after the noise. With `noised_later` the
        sums are not noised: they must go through `secagg.quantise.encode`, and only one step is made.

    Raises:
        ConfigError: several local steps whose noise would come too late for those after them.
    """
    if work.noised_later and context.config.training.local_steps != 1:
        raise ConfigError("noise is shared in rounds of one local step: set local-steps to 1, or trust to local")
    config, shape = context.config, generator_shape(context)
    training, privacy = config.training, config.privacy
    seed = config.federation.seed
    data = by_unit(work.data, privacy.unit, context.problem.num_classes)
    data = replace(data, embeddings=normalised(context, data.embeddings, work.params[CENTRE]))
    params, site = dict(work.params), dict(work.site.tensors)
    encoder = {name: value for name, value in site.items() if name.startswith("encoder.")}
    trained = trained_names(context, params)
    scale = step_scale(context, work.params)
    # records' gradients are summed in units of C over about q N / m units: terms without records must weigh the same
    free_scale = scale / clip_unit(context)
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
        noisy = _noised_sum(
            context, params, site.get("code"), encoder, batch, work.source, sent_too=not work.noised_later
        )
        raw: Tensors = {}
        if privacy.encoder_training == "unprotected":
            from common.methods.fedhypevae.as_printed import raw_gradients

            raw = raw_gradients(context, params, site.get("code"), encoder, batch, public)
        free = _data_free_gradients(context, params, site.get("code"), public)
        added = {name: held_within(free_scale * value, _MOST_ADDED) for name, value in free.items()}
        # Eq. (7), both parts: of records, and of none
        total = {name: value + added[name] if name in added else value for name, value in noisy.items()}
        for name in trained:
            uploads[name] = uploads[name] + total[name]
        # Eq. (8), the code and below it the encoder
        if "code" in site:
            step_code = raw["code"] if "code" in raw else total["code"] / scale
            site["code"] = project_code(site["code"] - training.code_rate * step_code, training.code_radius)
        for name in encoder:
            if name in raw or name in total:
                move = raw[name] if name in raw else total[name] / scale
                encoder[name] = encoder[name] - training.encoder_rate * move
        if training.local_steps > 1:
            for name in trained:
                moved = params[name] - rate_of(context, name, params) * total[name] / scale
                params[name] = held_within(moved, LARGEST_NORM)
    return SiteState({**site, **encoder}), uploads


def _noised_sum(
    context: RunContext,
    params: Tensors,
    code: Tensor | None,
    encoder: Tensors,
    batch: UnitBatch,
    source: NoiseSource,
    *,
    sent_too: bool,
) -> dict[str, Tensor]:
    """Clip every unit's gradient as one vector, add up, add noise: the only data-dependent values that are kept.

    Where the noise of what is sent comes later, code and encoder get all of theirs here: they lie at the site, and what
    it sends in later rounds depends on them. The rounding before the shared noise widens the whole vector's sensitivity
    by its margin. What is sent goes on in float64: what is added to it, without records but as large as the server's
    parameters make it, would round float32 sums to coarse steps, and so widen a difference between them.
    """
    config, shape = context.config, generator_shape(context)
    mode = config.privacy.encoder_training
    joint = mode == "joint" and config.training.elbo_weight > 0
    shapes = {name: params[name].shape for name in trained_names(context, params)}
    if joint:
        shapes |= {name: value.shape for name, value in encoder.items()}
    if code is not None and mode != "unprotected":
        shapes["code"] = code.shape
    sent = set() if sent_too else set(trained_names(context, params))
    noised = {name: size for name, size in shapes.items() if name not in sent}
    sigma, clip_norm = context.plan.training_noise, config.privacy.clip_norm
    margin = 1.0 if sent_too else 1.0 + ROUNDING_MARGIN
    latent = record_normals(config.training, shape.model.latent_dim, batch.mask.numel())
    planned = ((latent, 1.0), (numbers_in(noised), noise_std(sigma, clip_norm * margin))) if latent is not None else ()
    with drawn_ahead(source, batch.embeddings.device, planned) as drawn:
        offsets = params.get(CLASS_OFFSETS)
        factors = record_factors(shape, config.training, params, code, encoder, batch, drawn, offsets, joint=joint)
        if mode == "unprotected":
            from common.methods.fedhypevae.as_printed import without_code

            factors = map(without_code, factors)
        # Eq. (9), the clipped sum; its noise below
        summed = clipped_gradient_sum(factors, shapes, clip_norm)
        kept = {name: summed.tensors[name] for name in noised}
        widened = replace(summed, tensors=kept, sensitivity=summed.sensitivity * margin)
        bare = {name: summed.tensors[name].double() for name in sent}
        return {**bare, **noised_sum(widened, sigma, drawn)}


def _data_free_gradients(
    context: RunContext, params: Tensors, code: Tensor | None, draws: torch.Generator
) -> dict[str, Tensor]:
    """Gradient of the terms that read no record, by name; empty where there are none."""
    shape, training = generator_shape(context), context.config.training
    leaves = {name: params[name].detach().clone().requires_grad_() for name in trained_names(context, params)}
    if code is not None:
        leaves["code"] = code.clone().requires_grad_()
    target = None
    if TARGET in params:
        from common.generator.mmd import public_frequencies, unpack_target

        frequencies = public_frequencies(shape.dim, context.config.federation.seed)
        target = unpack_target(params[TARGET], frequencies, params[CENTRE])
    loss = data_free_loss(shape, training, {**params, **leaves}, leaves.get("code"), target, draws)
    if not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
