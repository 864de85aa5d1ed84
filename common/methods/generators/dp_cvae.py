"""DP-CVAE: a conditional VAE trained with DP-SGD at every site; the decoders are averaged and sampled.

Di Salvo et al. (2025), repaired: Poisson sampling in every step, noise calibrated for all steps that are run, clipping
of the encoder and decoder gradient as one vector. The encoder and Adam's moments stay at the site; both are made of
noised sums alone.

Departs from it: sites are averaged equally, since no site tells how many records it has; embeddings are centred by the
released mean, as for every method here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from common.adam import adam_step
from common.findings import label_vectors
from common.generator.cvae import gaussian_kl
from common.generator.layers import Layers, PlainLayers
from common.generator.row_law import Middle, RowLaw
from common.generator.tape import Tape
from common.methods.base import Artifact, Method, RunContext, ServerState, Shapes, SiteState, StepInput, Tensors, seeded
from common.methods.constants import CENTRE
from common.methods.features import feature_scale, network_data
from common.methods.generators.dp_network import init_layers, mean_of, noised_gradient_sum, normals, with_prefix
from common.methods.heads.linear import centre_statistics, with_centre
from common.methods.labels import label_tensors
from common.methods.plans import private_plan
from common.privacy.noise import NoiseSource
from common.privacy.sampling import draw_units
from common.records import UnitBatch

_HIDDEN = 3
_LOG_VARIANCE_BOUND = 10.0


def init(context: RunContext) -> ServerState:
    """The decoder, four linear layers, from the run's seed."""
    params = init_layers(_decoder_sizes(context), seeded("decoder", context.config.federation.seed))
    return ServerState(0, {**params, CENTRE: torch.zeros(context.problem.dim)})


def init_site(context: RunContext, site_index: int) -> SiteState:
    """The site's encoder, from public randomness."""
    settings, problem = context.config.rivals, context.problem
    widths = [problem.dim + problem.num_classes, *[settings.cvae_width] * _HIDDEN]
    sizes = {f"encoder.{layer}": pair for layer, pair in enumerate(pairwise(widths))}
    sizes |= dict.fromkeys(("encoder.mean", "encoder.log_variance"), (settings.cvae_width, settings.noise_dim))
    return SiteState(init_layers(sizes, seeded("encoder", context.config.federation.seed, site_index)))


def upload_shapes(context: RunContext) -> Shapes:
    """The decoder."""
    return {name: tuple(value.shape) for name, value in with_prefix(init(context).params, "decoder.").items()}


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """Local steps of DP-Adam on encoder and decoder.

    Returns:
        The encoder and Adam's moments, which stay; and the decoder. Both are functions of `count = local_steps`
        sampled Gaussian events with multiplier σ, for adding or removing one unit.
    """
    config = context.config
    data = network_data(context, work)
    moments = with_prefix(work.site.tensors, "adam.")
    params = with_prefix(work.params, "decoder.") | with_prefix(work.site.tensors, "encoder.")

    def losses(tape: Tape, batch: UnitBatch, source: NoiseSource) -> Tensor:
        latent_shape = (*batch.mask.shape, config.rivals.noise_dim)
        return record_losses(tape, batch, context.problem.num_classes, normals(latent_shape, source))

    for _ in range(config.training.local_steps):
        batch = draw_units(data, config.privacy.sampling_rate, config.privacy.records_per_unit, work.source)
        gradients = noised_gradient_sum(context, params, batch, losses, work.source, config.rivals.noise_dim)
        params, moments = adam_step(params, gradients, moments, config.rivals.adam_rate)
    return SiteState(with_prefix(params, "encoder.") | moments), with_prefix(params, "decoder.")


def record_losses(layers: Layers, batch: UnitBatch, num_classes: int, noise: Tensor) -> Tensor:
    """Negative ELBO of every unit under a standard normal prior and unit variance, divided by d_x.

    Args:
        layers: encoder and decoder.
        batch: features (U, R, d_x), labels and mask (U, R).
        num_classes: K.
        noise: (U, R, d_z) standard normal, for the one-sample estimate.

    Returns:
        (U,), each a function of its own unit's records.
    """
    one_hot = label_vectors(batch.labels, num_classes, batch.embeddings.dtype)
    hidden = torch.cat([batch.embeddings, one_hot], -1)
    for layer in range(_HIDDEN):
        hidden = torch.relu(layers.linear(f"encoder.{layer}", hidden))
    mean = layers.linear("encoder.mean", hidden)
    log_scale = 0.5 * layers.linear("encoder.log_variance", hidden).clamp(-_LOG_VARIANCE_BOUND, _LOG_VARIANCE_BOUND)
    rebuilt = decode(layers, mean + torch.exp(log_scale) * noise, one_hot)
    error = 0.5 * (batch.embeddings - rebuilt).square().sum(-1)
    divergence = gaussian_kl(mean, log_scale, torch.zeros_like(mean), torch.zeros_like(mean))
    return ((error + divergence) * batch.mask).sum(1) / batch.embeddings.shape[-1]


def decode(layers: Layers, latent: Tensor, one_hot: Tensor) -> Tensor:
    """Features from latents (..., d_z) and classes (..., K): (..., d_x)."""
    hidden = torch.cat([latent, one_hot], -1)
    for layer in range(_HIDDEN):
        hidden = torch.relu(layers.linear(f"decoder.{layer}", hidden))
    return layers.linear(f"decoder.{_HIDDEN}", hidden)


def server_step(context: RunContext, state: ServerState, uploads: Mapping[int, Tensors]) -> ServerState:
    """The average of the sites' decoders."""
    return replace(state, round=state.round + 1, params={**state.params, **mean_of(uploads)})


def finish(context: RunContext, state: ServerState) -> Artifact:
    """The decoder and the centre."""
    problem, scale = context.problem, feature_scale(context, context.problem.dim)
    settings: dict[str, str | int | float | bool] = {
        "dim": problem.dim,
        "num_classes": problem.num_classes,
        "scale": scale,
    }
    return Artifact("generator", {**state.params, **label_tensors(context, state.statistics)}, settings)


def law(context: RunContext, artifact: Artifact) -> RowLaw:
    """Decoded draws of N(0, I) with the labels that were asked for. Post-processing."""
    return decoded_law(context, artifact, decode)


def decoded_law(context: RunContext, artifact: Artifact, decoder: Callable[[Layers, Tensor, Tensor], Tensor]) -> RowLaw:
    """Rows that a decoder of (layers, latents (n, d_z), classes (n, K)) makes, without noise of their own."""
    layers = PlainLayers({name: value.double() for name, value in artifact.tensors.items()})
    scale, centre = feature_scale(context, context.problem.dim), artifact.tensors[CENTRE].double()

    def middle(labels: Tensor, uniforms: Tensor, normals: Tensor) -> Middle:
        del uniforms
        one_hot = label_vectors(labels, context.problem.num_classes, torch.float64)
        rows = decoder(layers, normals, one_hot) / scale + centre
        return Middle(rows, rows.new_zeros(len(rows), 1), torch.zeros(len(rows), dtype=torch.int64))

    task = context.problem.task
    return RowLaw(context.problem.dim, 0, context.config.rivals.noise_dim, middle, noisy=False, task=task)


def _decoder_sizes(context: RunContext) -> dict[str, tuple[int, int]]:
    settings, problem = context.config.rivals, context.problem
    widths = [settings.noise_dim + problem.num_classes, *[settings.cvae_width] * _HIDDEN, problem.dim]
    return {f"decoder.{layer}": pair for layer, pair in enumerate(pairwise(widths))}


METHOD = Method(
    name="dp_cvae",
    private=True,
    plan=private_plan,
    statistics=centre_statistics,
    init=init,
    init_site=init_site,
    prepare=with_centre,
    upload_shapes=upload_shapes,
    client_step=client_step,
    server_step=server_step,
    finish=finish,
    law=law,
    uploads_sums=False,
)
