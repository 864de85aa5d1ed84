"""Small generators of every kind, and a slow reference of their per-unit losses, for the tests of the mathematics.

The reference writes the equations with explicit matrices W(v) = diag(d(v)) W and torch's own distributions, takes its
gradients from autograd, one unit at a time, and shares no code with the tape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.config.generator import MMD_BANDWIDTHS, TrainingConfig
from common.config.run import RunConfig
from common.generator.cvae import init_encoder_params
from common.generator.hypernetwork import GeneratorShape, init_hypernet_params
from common.generator.layers import PlainLayers
from common.generator.objective import record_losses
from common.generator.tape import Tape
from common.privacy import clipping
from common.privacy.clipping import ClippedSum, clipped_gradient_sum
from common.privacy.factors import GradientFactors
from common.privacy.unit_factors import AllFactors, EachFactor


@contextmanager
def summing(where: str) -> Iterator[None]:
    """The clipping as a processor does it, factor by factor, or as a GPU does, with all factors in one matrix."""

    def at_once(factors: GradientFactors, vectors: dict[str, Tensor]) -> AllFactors | EachFactor:
        return AllFactors(factors, vectors) if any(True for _ in factors.tensors()) else EachFactor()

    with pytest.MonkeyPatch.context() as patch:
        if where == "gpu":
            patch.setattr(clipping, "_lengths", at_once)
        yield


class UnitDraws:
    """Numbers that belong to a unit, not to its place: the same for a unit whichever others are in the batch."""

    name = "test"
    certified = False

    def __init__(self, units: list[int], seed: int = 0) -> None:
        self._units, self._seed, self._calls = units, seed, 0
        self._rows = max(units, default=0) + 1  # the first rows are the same however many are drawn

    def gaussian(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        return std * self._generator().standard_normal((self._rows, *shape[1:]))[self._units]

    def uniform(self, size: int) -> np.ndarray:
        rows = size // max(len(self._units), 1)
        return self._generator().random((self._rows, rows))[self._units].reshape(-1)

    def exact_gaussian(self, values: np.ndarray, std: float) -> np.ndarray:
        raise NotImplementedError

    def _generator(self) -> np.random.Generator:
        self._calls += 1
        return np.random.default_rng([self._seed, self._calls])


@dataclass(frozen=True)
class Case:
    """A generator with random weights everywhere, and units of records."""

    shape: GeneratorShape
    training: TrainingConfig
    params: dict[str, Tensor]
    code: Tensor | None
    encoder: dict[str, Tensor]
    embeddings: Tensor
    labels: Tensor
    mask: Tensor
    joint: bool

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that is clipped as one vector."""
        leaves = dict(self.params)
        if self.joint:
            leaves |= self.encoder
        if self.code is not None:
            leaves["code"] = self.code
        return leaves

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self.leaves.items()}


def make_case(units: int = 5, rows: int = 1, dim: int = 6, *, joint: bool = False, seed: int = 0, **flat) -> Case:
    """A case with the settings `flat` (of RunConfig), every weight away from its starting value."""
    config = RunConfig().replace(**{"latent_dim": 2, "encoder_width": 3, "prior_width": 3, **flat})
    generator = torch.Generator().manual_seed(seed)
    shape = GeneratorShape.of(dim, 3, config.model, config.training)

    def jitter(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: p + 0.3 * torch.randn(p.shape, generator=generator) for name, p in params.items()}

    params = jitter(init_hypernet_params(shape, generator))
    encoder = jitter(init_encoder_params(shape, generator))
    code = torch.randn(config.model.code_dim, generator=generator) if config.model.code_dim else None
    mask = torch.ones(units, rows)
    for unit in range(units):
        mask[unit, rows - unit % rows :] = 0.0  # units of unlike numbers of records
    embeddings = torch.randn(units, rows, dim, generator=generator) / dim**0.5 * mask[..., None]
    labels = torch.randint(3, (units, rows), generator=generator) * mask.long()
    return Case(shape, config.training, params, code, encoder, embeddings, labels, mask, joint)


def record_factors(case: Case, units: list[int], training: TrainingConfig | None = None) -> GradientFactors:
    """The product's way: one tape over the chosen units."""
    if not units:
        return GradientFactors()
    tape = Tape({**case.params, **case.encoder} if case.joint else case.params, case.code, len(units))
    layers = tape if case.joint else PlainLayers(case.encoder)
    rows = torch.tensor(units)
    losses = record_losses(
        case.shape,
        case.training if training is None else training,
        tape,
        layers,
        case.embeddings[rows],
        case.labels[rows],
        case.mask[rows],
        UnitDraws(units),
    )
    return tape.factors(losses)


def product_sum(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    """The product's clipped sum over the chosen units."""
    return clipped_gradient_sum(record_factors(case, units), case.shapes, clip_norm)


def reference_inputs(case: Case, unit: int) -> tuple[Tensor, ...]:
    """(x, y, mask, latent noise, drawn labels, drawn latents, drawn observation noise) of a unit, in draw order."""
    draws, rows = UnitDraws([unit]), case.embeddings.shape[1]
    size, latent = case.shape.num_classes, case.shape.model.latent_dim
    noise = torch.zeros(rows, latent)
    if latent and case.training.elbo_weight > 0:
        noise = torch.from_numpy(draws.gaussian((1, rows, latent), 1.0))[0].float()
    hot = functional.one_hot(case.labels[unit], size).float()
    drawn_hot, drawn_noise, seen = hot, torch.zeros(rows, latent), torch.zeros(rows, case.shape.dim)
    if case.training.mmd == "per-example":
        drawn = torch.from_numpy(np.floor(draws.uniform(rows) * size)).long()
        drawn_hot = functional.one_hot(drawn, size).float()
        if latent:
            drawn_noise = torch.from_numpy(draws.gaussian((1, rows, latent), 1.0))[0].float()
        seen = torch.from_numpy(draws.gaussian((1, rows, case.shape.dim), 1.0))[0].float()
    return case.embeddings[unit], hot, case.mask[unit], noise, drawn_hot, drawn_noise, seen


def reference_loss(
    case: Case,
    leaves: dict[str, Tensor],
    x: Tensor,
    hot: Tensor,
    mask: Tensor,
    noise: Tensor,
    drawn_hot: Tensor,
    drawn_noise: Tensor,
    seen: Tensor,
) -> Tensor:
    """Loss of one unit straight from Eqs. 1-6, with explicit W(v) = diag(d(v)) W."""
    p = {**case.encoder, **leaves}
    model, dim, variance = case.shape.model, case.shape.dim, case.shape.model.residual_energy / case.shape.dim
    code = p.get("code")
    features = code
    if code is not None and model.trunk_width:
        features = torch.tanh(p["trunk.weight"] @ code + p["trunk.bias"])
    last = f"decoder.{len(model.widths)}"

    def row_scale(name: str) -> Tensor:
        ones = torch.ones(p[f"{name}.base_bias"].shape[0])
        return ones if features is None else ones + p[f"{name}.row_scale"] @ features

    def layer(name: str, inputs: Tensor, labels: Tensor | None) -> Tensor:
        weight = p[f"{name}.base_weight"]
        if labels is not None:
            weight = torch.cat([weight, variance * p[f"{name}.class_weight"]], 1)
            inputs = torch.cat([inputs, labels], -1)
        bias = p[f"{name}.base_bias"]
        if features is not None:
            bias = bias + p[f"{name}.bias_shift"] @ features
        return inputs @ (torch.diag(row_scale(name)) @ weight).T + bias

    def decoder(latent: Tensor, labels: Tensor) -> Tensor:
        for index in range(len(model.widths)):
            latent = functional.silu(layer(f"decoder.{index}", latent, None))
        return layer(last, latent, labels)

    def prior(labels: Tensor) -> torch.distributions.Normal:
        inputs = labels @ p["prior.embedding.weight"].T
        if code is not None:
            body = torch.tanh(p["prior.trunk.weight"] @ code + p["prior.trunk.bias"])
            inputs = torch.cat([body.expand(inputs.shape[0], -1), inputs], -1)
        mean, raw = (inputs @ p["prior.head.weight"].T + p["prior.head.bias"]).chunk(2, -1)
        return torch.distributions.Normal(mean, torch.exp(2 * torch.tanh(raw / 2)), validate_args=False)

    loss = torch.zeros(())
    if case.training.elbo_weight > 0:
        latent, divergence = noise, torch.zeros(x.shape[0])
        if model.latent_dim:
            inputs = torch.cat([x * dim**0.5, hot], -1)
            hidden = functional.silu(inputs @ p["encoder.0.weight"].T + p["encoder.0.bias"])
            mean, raw = (hidden @ p["encoder.1.weight"].T + p["encoder.1.bias"]).chunk(2, -1)
            spread = torch.exp(4 * torch.tanh(raw / 4))
            latent = mean + spread * noise
            posterior = torch.distributions.Normal(mean, spread, validate_args=False)
            divergence = torch.distributions.kl_divergence(posterior, prior(hot)).sum(-1)
        seen_law = torch.distributions.Normal(decoder(latent, hot), variance**0.5, validate_args=False)
        elbo = seen_law.log_prob(x).sum(-1) - divergence
        loss = loss - case.training.elbo_weight / dim * (elbo * mask).sum()
    if case.training.discriminative_weight > 0:
        bias = p["class_bias.weight"]
        if features is not None:
            bias = bias + p["class_shift.weight"] @ features
        scores = x @ torch.diag(row_scale(last)) @ p[f"{last}.class_weight"] + case.shape.class_bias_scale * bias
        entropy = -(torch.log_softmax(scores, -1) * hot).sum(-1)
        loss = loss + case.training.discriminative_weight * (entropy * mask).sum()
    if case.training.mmd == "per-example" and case.training.mmd_weight > 0:
        latent = drawn_noise
        if model.latent_dim:
            law = prior(drawn_hot)
            latent = law.mean + law.stddev * drawn_noise
        synthetic = decoder(latent, drawn_hot) + variance**0.5 * seen
        gap = (x - synthetic).square().sum(-1)
        widths = MMD_BANDWIDTHS
        kernel = sum(torch.exp(-gap / (2 * width**2)) for width in widths) / len(widths)
        loss = loss + case.training.mmd_weight * (-2 * kernel * mask).sum()
    return loss


def reference_gradient(case: Case, unit: int) -> dict[str, Tensor]:
    """Gradient of one unit's loss in everything that is clipped, from autograd on a batch of one."""
    leaves = {name: value.clone().requires_grad_() for name, value in case.leaves.items()}
    loss = reference_loss(case, leaves, *reference_inputs(case, unit))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All tensors as one float64 vector, by name."""
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


CASES = {
    "default": {},
    "patients": {"rows": 3},
    "joint": {"joint": True},
    "joint patients": {"joint": True, "rows": 3},
    "hidden": {"hidden_widths": "4,3"},
    "trunk": {"trunk_width": 4},
    "hidden trunk joint patients": {"hidden_widths": "4", "trunk_width": 4, "joint": True, "rows": 3},
    "mmd": {"mmd": "per-example", "mmd_weight": 0.5},
    "mmd patients": {
        "mmd": "per-example",
        "mmd_weight": 0.5,
        "rows": 2,
        "hidden_widths": "4",
        "trunk_width": 3,
    },
    "mmd without elbo": {"mmd": "per-example", "mmd_weight": 0.5, "elbo_weight": 0.0},
    "no code": {"code_dim": 0},
    "no code joint": {"code_dim": 0, "joint": True, "hidden_widths": "4"},
    "no latent": {"latent_dim": 0},
    "no latent mmd": {"latent_dim": 0, "mmd": "per-example", "mmd_weight": 0.5},
    "no latent no code": {"latent_dim": 0, "code_dim": 0},
    "elbo only": {"discriminative_weight": 0.0},
    "classes only": {"elbo_weight": 0.0, "trunk_width": 3},
}
