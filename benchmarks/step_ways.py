"""One client step in seven ways on the same records: plain, ours without and with noise, three others', noise alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config.presets import PAPER_SIZES
from common.config.run import RunConfig, Scalar
from common.devices import sent_to
from common.generator.cvae import encode, gaussian_kl, gaussian_log_likelihood, init_encoder_params
from common.generator.hypernetwork import (
    GeneratorShape,
    class_prior,
    class_scores,
    decode,
    init_code,
    init_hypernet_params,
)
from common.generator.layers import PlainLayers
from common.generator.objective import record_factors
from common.methods import get_method
from common.methods.base import Problem, RunContext
from common.methods.fedhypevae.site import _noised_sum
from common.privacy.clipping import clipped_gradient_sum
from common.privacy.mechanism import add_gaussian
from common.privacy.noise import SecureNoise
from common.records import UnitBatch

CLASSES = 11
Way = Callable[[], object]
DECODERS: Mapping[str, Mapping[str, Scalar]] = {"small": {}, "paper-sized": PAPER_SIZES}  # small: the default


class _RowScaled(nn.Module):
    """The row-scaled layer in Linears."""

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.scale = nn.Linear(features, outputs, bias=False)
        self.shift = nn.Linear(features, outputs)


class OpacusGenerator(nn.Module):
    """The same work in layers that Opacus knows; the label columns, used twice in our model, are two matrices here."""

    def __init__(self, shape: GeneratorShape, config: RunConfig) -> None:
        super().__init__()
        model, features = config.model, shape.feature_dim
        self.shape, self.training_config = shape, config.training
        self.code = nn.Embedding(1, model.code_dim)
        self.trunk = nn.Linear(model.code_dim, model.trunk_width) if model.trunk_width else None
        sizes = itertools.pairwise([model.latent_dim, *model.widths, shape.dim])
        self.layers = nn.ModuleList(_RowScaled(inputs, outputs, features) for inputs, outputs in sizes)
        self.classes = nn.Linear(CLASSES, shape.dim, bias=False)
        self.scores = nn.Linear(shape.dim, CLASSES)
        self.score_shift = nn.Linear(features, CLASSES, bias=False)
        self.prior_trunk = nn.Linear(model.code_dim, model.prior_width)
        self.prior_embedding = nn.Linear(CLASSES, model.label_embedding_dim, bias=False)
        self.prior_head = nn.Linear(model.prior_width + model.label_embedding_dim, 2 * model.latent_dim)

    def forward(self, x: Tensor, hot: Tensor, mean: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
        """Losses, (B, 1)."""
        code = self.code(torch.zeros(x.shape[0], dtype=torch.long))
        features = code if self.trunk is None else torch.tanh(self.trunk(code))
        hidden, row_scale, decoded = mean + torch.exp(log_scale) * noise, x, x
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, _RowScaled):
                raise TypeError(f"expected row-scaled layers, found {type(layer).__name__}")
            row_scale, inner = 1 + layer.scale(features), layer.base(hidden)
            if number == len(self.layers) - 1:
                inner = inner + self.shape.observation_variance * self.classes(hot)
            decoded = row_scale * inner + layer.shift(features)
            hidden = functional.silu(decoded)
        head = self.prior_head(torch.cat([torch.tanh(self.prior_trunk(code)), self.prior_embedding(hot)], -1))
        prior_mean, raw = head.chunk(2, -1)
        divergence = gaussian_kl(mean, log_scale, prior_mean, 2 * torch.tanh(raw / 2))
        elbo = gaussian_log_likelihood(x, decoded, self.shape.observation_variance) - divergence
        scores = self.scores(row_scale * x) + self.score_shift(features)
        entropy = functional.cross_entropy(scores, hot.argmax(1), reduction="none")
        return (entropy - self.training_config.elbo_weight / self.shape.dim * elbo)[:, None]


@dataclass(frozen=True)
class StepWays:
    """The ways of one step by name, each call a whole step; and what one copy of the gradient for each record takes."""

    ways: dict[str, Way]
    gradient_copies_bytes: int


def build_ways(batch: int, dim: int, decoder: str) -> StepWays:
    """Every way of doing the step on the same records, on the device that tensors are made on now (`computing_on`)."""
    config = RunConfig.from_flat(dict(DECODERS[decoder]))
    shape = GeneratorShape.of(dim, CLASSES, config.model, config.training)
    generator = torch.Generator().manual_seed(0)
    params, encoder = init_hypernet_params(shape, generator), init_encoder_params(shape, generator)
    code = init_code(shape, 1.0, generator)
    x = functional.normalize(torch.randn(batch, dim, generator=generator), dim=1)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    hot = functional.one_hot(labels, CLASSES).float()
    clip_norm, training, source = config.privacy.clip_norm, config.training, SecureNoise()
    shapes = {name: value.shape for name, value in params.items()} | {"code": code.shape}
    units = UnitBatch(x[:, None], labels[:, None], torch.ones(batch, 1))

    def normals() -> Tensor:
        return sent_to(x.device, torch.from_numpy(source.gaussian((batch, shape.model.latent_dim), 1.0))).float()

    def private() -> dict[str, Tensor]:
        factors = record_factors(shape, training, params, code, encoder, units, source)
        return clipped_gradient_sum(factors, shapes, clip_norm).tensors

    method = get_method("fedhypevae")
    problem = Problem(dim, tuple(str(number) for number in range(CLASSES)), 2)
    context = RunContext(config, problem, method.plan(config))

    def private_with_noise() -> dict[str, Tensor]:
        return _noised_sum(context, params, code, encoder, units, source, sent_too=True)

    def plain() -> tuple[Tensor, ...]:
        leaves = {name: value.detach().requires_grad_() for name, value in {**params, "code": code}.items()}
        layers = PlainLayers.at(leaves, leaves["code"])
        mean, log_scale = encode(shape, PlainLayers(encoder), x, hot)
        latent = mean + torch.exp(log_scale) * normals()
        divergence = gaussian_kl(mean, log_scale, *class_prior(layers, hot))
        decoded = decode(shape, layers, latent, hot)
        elbo = gaussian_log_likelihood(x, decoded, shape.observation_variance) - divergence
        entropy = functional.cross_entropy(class_scores(shape, layers, x), labels, reduction="none")
        loss = (entropy - training.elbo_weight / dim * elbo).mean()
        return torch.autograd.grad(loss, list(leaves.values()))

    def opacus_inputs() -> tuple[Tensor, ...]:
        mean, log_scale = encode(shape, PlainLayers(encoder), x, hot)
        return x, hot, mean, log_scale, normals()

    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    hooked = GradSampleModule(OpacusGenerator(shape, config), loss_reduction="sum")
    ghosted = GradSampleModuleFastGradientClipping(
        OpacusGenerator(shape, config), loss_reduction="sum", max_grad_norm=clip_norm, use_ghost_clipping=True
    )
    functional_module = OpacusGenerator(shape, config)

    def clipped(samples: list[Tensor]) -> list[Tensor]:
        norms = torch.stack([sample.flatten(1).square().sum(1) for sample in samples]).sum(0).sqrt()
        factor = (clip_norm / norms).clamp(max=1.0)
        return [torch.einsum("b,b...->...", factor, sample) for sample in samples]

    def hooks() -> list[Tensor]:
        hooked.zero_grad(set_to_none=True)
        hooked(*opacus_inputs()).sum().backward()
        return clipped([parameter.grad_sample for parameter in hooked.parameters()])

    def ghost() -> None:
        ghosted.zero_grad(set_to_none=True)
        ghosted.enable_hooks()
        losses = ghosted(*opacus_inputs())[:, 0]
        losses.sum().backward(retain_graph=True)
        factor = ghosted.get_clipping_coef().detach()
        ghosted.zero_grad(set_to_none=True)
        ghosted.disable_hooks()
        (factor * losses).sum().backward()

    def one_loss(leaves: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        single = tuple(value[None] for value in inputs)
        return torch.func.functional_call(functional_module, leaves, single)[0, 0]

    per_example = torch.func.vmap(torch.func.grad(one_loss), in_dims=(None, 0, 0, 0, 0, 0))

    def vmap() -> list[Tensor]:
        leaves = {name: value.detach() for name, value in functional_module.named_parameters()}
        return clipped(list(per_example(leaves, *opacus_inputs()).values()))

    zeros = {name: torch.zeros(value) for name, value in shapes.items()}
    ways: dict[str, Way] = {
        "plain": plain,
        "private": private,
        "private with noise": private_with_noise,
        "opacus ghost": ghost,
        "opacus hooks": hooks,
        "vmap": vmap,
        "noise alone": lambda: add_gaussian(zeros, 1.0, source),
    }
    parameters = sum(parameter.numel() for parameter in functional_module.parameters())
    return StepWays(ways, 4 * batch * parameters)
