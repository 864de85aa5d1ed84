"""DP-CGAN: a conditional GAN whose discriminator learns with DP-SGD at every site; the generators are averaged.

Torkzadehmahani et al. (2019), in the sizes that Di Salvo et al. (2025) compare with. A record contributes a real row
and a fake row with its label; both belong to its gradient, which is clipped as one vector. The discriminator and Adam's
moments stay at the site, made of noised sums; the generator learns from the discriminator alone, which costs nothing.

Departs from both: neither network starts again in a round; sites are averaged equally.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from common.adam import adam_step
from common.bounds import held_within
from common.generator.layers import Layers, PlainLayers
from common.generator.row_law import RowLaw
from common.generator.tape import Tape
from common.methods.base import Artifact, Method, RunContext, ServerState, Shapes, SiteState, StepInput, Tensors, seeded
from common.methods.constants import CENTRE
from common.methods.features import network_data
from common.methods.generators import dp_cvae
from common.methods.generators.dp_network import init_layers, noised_gradient_sum, normals, with_prefix
from common.methods.heads.linear import centre_statistics, with_centre
from common.methods.labels import check_classes
from common.methods.plans import private_plan
from common.privacy.noise import NoiseSource
from common.privacy.sampling import draw_units
from common.records import UnitBatch

_BETAS = (0.5, 0.999)
_SLOPE = 0.2
_GENERATOR_BATCH = 256
_MOST_PULLED = 1e15  # of a gradient that reads no record: its square is a float32


def init(context: RunContext) -> ServerState:
    """The generator, three linear layers, from the run's seed."""
    width, problem = context.config.rivals.gan_width, context.problem
    sizes = {
        "generator.0": (context.config.rivals.noise_dim + problem.num_classes, width),
        "generator.1": (width, 2 * width),
        "generator.2": (2 * width, problem.dim),
    }
    params = init_layers(sizes, seeded("generator", context.config.federation.seed))
    return ServerState(0, {**params, CENTRE: torch.zeros(problem.dim)})


def init_site(context: RunContext, site_index: int) -> SiteState:
    """The site's discriminator, from public randomness."""
    width, problem = context.config.rivals.gan_width, context.problem
    sizes = {
        "discriminator.0": (problem.dim + problem.num_classes, 2 * width),
        "discriminator.1": (2 * width, width),
        "discriminator.2": (width, 1),
    }
    return SiteState(init_layers(sizes, seeded("discriminator", context.config.federation.seed, site_index)))


def upload_shapes(context: RunContext) -> Shapes:
    """The generator."""
    return {name: tuple(value.shape) for name, value in with_prefix(init(context).params, "generator.").items()}


def client_step(context: RunContext, work: StepInput) -> tuple[SiteState, dict[str, Tensor]]:
    """Local steps: a noised one of the discriminator, then one of the generator that reads no record.

    Returns:
        The discriminator and both networks' moments, which stay; and the generator. All are functions of
        `count = local_steps` sampled Gaussian events with multiplier σ, for adding or removing one unit.
    """
    config, num_classes = context.config, context.problem.num_classes
    data = network_data(context, work)
    generator = with_prefix(work.params, "generator.")
    discriminator = with_prefix(work.site.tensors, "discriminator.")
    moments = {network: _moments(work.site, network) for network in ("discriminator", "generator")}
    for step in range(config.training.local_steps):
        batch = draw_units(data, config.privacy.sampling_rate, config.privacy.records_per_unit, work.source)

        def losses(tape: Tape, units: UnitBatch, source: NoiseSource, made_by: Tensors = generator) -> Tensor:
            noise = normals((*units.labels.shape, config.rivals.noise_dim), source)
            return discriminator_losses(tape, made_by, units, num_classes, noise)

        gradients = noised_gradient_sum(context, discriminator, batch, losses, work.source, config.rivals.noise_dim)
        discriminator, moments["discriminator"] = adam_step(
            discriminator, gradients, moments["discriminator"], config.rivals.adam_rate, _BETAS
        )
        public = seeded("generator", config.federation.seed, work.site_index, work.round_index, step)
        labels = torch.randint(num_classes, (_GENERATOR_BATCH,), generator=public)
        noise = torch.randn(_GENERATOR_BATCH, config.rivals.noise_dim, generator=public)
        pulled = generator_gradients(generator, discriminator, labels, noise, num_classes)
        pulled = {name: held_within(value, _MOST_PULLED) for name, value in pulled.items()}
        generator, moments["generator"] = adam_step(
            generator, pulled, moments["generator"], config.rivals.adam_rate, _BETAS
        )
    kept = {f"moments.{of}.{name}": value for of, values in moments.items() for name, value in values.items()}
    return SiteState(discriminator | kept), generator


def discriminator_losses(
    layers: Layers, generator: Tensors, batch: UnitBatch, num_classes: int, noise: Tensor
) -> Tensor:
    """Cross-entropy of telling each record from a fake with its label, both rows in one loss a unit.

    Args:
        layers: the discriminator.
        generator: makes the fake rows; takes no gradient.
        batch: features (U, R, d_x), labels and mask (U, R).
        num_classes: K.
        noise: (U, R, d_z) standard normal.

    Returns:
        (U,).
    """
    one_hot = functional.one_hot(batch.labels, num_classes).to(batch.embeddings.dtype)
    fake = generate(PlainLayers(generator), noise, one_hot).detach()
    rows = torch.cat([torch.cat([batch.embeddings, one_hot], -1), torch.cat([fake, one_hot], -1)], 1)
    scores = discriminator_scores(layers, rows)
    real, made = scores.chunk(2, 1)
    return ((functional.softplus(-real) + functional.softplus(made)) * batch.mask).sum(1)


def generator_gradients(
    generator: Tensors, discriminator: Tensors, labels: Tensor, noise: Tensor, num_classes: int
) -> dict[str, Tensor]:
    """Gradient of the generator's non-saturating loss: labels (n,), noise (n, d_z). Reads no record."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in generator.items()}
    one_hot = functional.one_hot(labels, num_classes).float()
    fake = generate(PlainLayers(leaves), noise, one_hot)
    loss = functional.softplus(-discriminator_scores(PlainLayers(discriminator), torch.cat([fake, one_hot], -1))).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def discriminator_scores(layers: Layers, rows: Tensor) -> Tensor:
    """Logits of being real, of features beside one-hot classes: (..., d_x + K) -> (...)."""
    hidden = functional.leaky_relu(layers.linear("discriminator.0", rows), _SLOPE)
    hidden = functional.leaky_relu(layers.linear("discriminator.1", hidden), _SLOPE)
    return layers.linear("discriminator.2", hidden)[..., 0]


def generate(layers: Layers, noise: Tensor, one_hot: Tensor) -> Tensor:
    """Fake features from noise (..., d_z) and classes (..., K): (..., d_x)."""
    hidden = functional.leaky_relu(layers.linear("generator.0", torch.cat([noise, one_hot], -1)), _SLOPE)
    return layers.linear("generator.2", functional.leaky_relu(layers.linear("generator.1", hidden), _SLOPE))


def law(context: RunContext, artifact: Artifact) -> RowLaw:
    """Fakes with the labels that were asked for. Post-processing."""
    return dp_cvae.decoded_law(context, artifact, generate)


def _moments(site: SiteState, network: str) -> dict[str, Tensor]:
    """Adam's moments of one of the two networks."""
    start = f"moments.{network}."
    return {name.removeprefix(start): value for name, value in site.tensors.items() if name.startswith(start)}


METHOD = Method(
    name="dp_cgan",
    private=True,
    plan=private_plan,
    statistics=centre_statistics,
    init=init,
    init_site=init_site,
    prepare=with_centre,
    upload_shapes=upload_shapes,
    client_step=client_step,
    server_step=dp_cvae.server_step,
    finish=dp_cvae.finish,
    law=law,
    uploads_sums=False,
    check=check_classes,
)
