"""The generator: a decoder and class priors that a shared hypernetwork makes from a small private code (Eqs. 2-4).

All functions are pure over a flat dict of tensors, `hypernet_params` (Φ):

    decoder.{l}.base_weight (r, c), base_bias (r,)   base decoder
    decoder.{l}.row_scale (r, d_t), bias_shift (r, d_t)   heads of the hypernetwork, zero at the start
    decoder.{out}.class_weight (r, K)                a column for each class in the last layer, in logit units
    class_bias.weight (K,), class_shift.weight (K, d_t)   scores of the classes, and their shift by the code
    trunk.weight (d_t, d_v), trunk.bias (d_t,)       optional body between code and heads
    prior.trunk.* , prior.embedding.weight (d_e, K), prior.head.* (2 d_z, h + d_e)   class priors

A generated embedding is x = τ d(v)∘C y + d(v)∘(W h(z)) + b + shift(v) + noise of variance τ a coordinate, around the
released centre. With d_z = 0 and no code it is one Gaussian a class with one shared variance. Its class posterior under
those columns is softmax(C^T (d(v)∘x) + class bias): the discriminative term of `objective.py` trains it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.config.generator import ModelConfig, TrainingConfig
from common.generator.layers import Layers, PlainLayers, Tensors

LOG_SCALE_BOUND = 2.0


@dataclass(frozen=True)
class GeneratorShape:
    """Public sizes of a generator.

    Attributes:
        dim: d_x, width of an embedding.
        num_classes: K.
        model: layer sizes.
        class_bias_scale: factor of the class biases in the scores.
        findings: whether several of the K labels can hold at once: a sigmoid for each, and y has a 1 for each.
    """

    dim: int
    num_classes: int
    model: ModelConfig
    class_bias_scale: float = 0.117
    findings: bool = False

    @classmethod
    def of(
        cls, dim: int, num_classes: int, model: ModelConfig, training: TrainingConfig, *, findings: bool = False
    ) -> GeneratorShape:
        """The shape that a configuration gives for embeddings of width `dim`."""
        return cls(dim, num_classes, model, training.class_bias_scale, findings)

    @property
    def observation_variance(self) -> float:
        """τ: variance of the decoder's Gaussian in every coordinate, a public constant."""
        return self.model.residual_energy / self.dim

    @property
    def num_layers(self) -> int:
        """Number of row-scaled layers of the decoder."""
        return len(self.model.widths) + 1

    @property
    def output_layer(self) -> str:
        """Name of the decoder's last layer."""
        return f"decoder.{self.num_layers - 1}"

    @property
    def feature_dim(self) -> int:
        """d_t: width of what the heads read; the code itself where there is no trunk."""
        return self.model.trunk_width if self.model.trunk_width > 0 else self.model.code_dim


def init_hypernet_params(shape: GeneratorShape, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw Φ.

    Args:
        shape: public sizes.
        generator: source of the draw; data-independent.

    Returns:
        Φ as a flat dict of float32 tensors. Row scales and shifts start at zero, so that d(v) = 1 and shift(v) = 0:
        an untrained hypernetwork leaves the base decoder unchanged.
    """

    def normal(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(max(columns, 1)))

    model, features = shape.model, shape.feature_dim
    params: dict[str, Tensor] = {}
    sizes = [model.latent_dim, *model.widths, shape.dim]
    for layer, (columns, rows) in enumerate(itertools.pairwise(sizes)):
        name, last = f"decoder.{layer}", layer == shape.num_layers - 1
        # the last layer starts small: its rows add up to an embedding of norm about 1
        params[f"{name}.base_weight"] = normal(rows, columns, 0.1 / math.sqrt(rows) if last else 1.0)
        params[f"{name}.base_bias"] = torch.zeros(rows)
        if features:
            params[f"{name}.row_scale"] = torch.zeros(rows, features)
            params[f"{name}.bias_shift"] = torch.zeros(rows, features)
    params[f"{shape.output_layer}.class_weight"] = torch.zeros(shape.dim, shape.num_classes)
    params["class_bias.weight"] = torch.zeros(shape.num_classes)
    if features:
        params["class_shift.weight"] = torch.zeros(shape.num_classes, features)
    if model.code_dim and model.trunk_width:
        params["trunk.weight"] = normal(model.trunk_width, model.code_dim)
        params["trunk.bias"] = torch.zeros(model.trunk_width)
    if model.latent_dim:
        if model.code_dim:
            params["prior.trunk.weight"] = normal(model.prior_width, model.code_dim)
            params["prior.trunk.bias"] = torch.zeros(model.prior_width)
        width = (model.prior_width if model.code_dim else 0) + model.label_embedding_dim
        params["prior.embedding.weight"] = normal(model.label_embedding_dim, shape.num_classes)
        params["prior.head.weight"] = torch.zeros(2 * model.latent_dim, width)
        params["prior.head.bias"] = torch.zeros(2 * model.latent_dim)
    return params


def init_code(shape: GeneratorShape, radius: float, generator: torch.Generator) -> Tensor:
    """A site's first code, (d_v,): standard normal as in Algorithm 1, brought within |v| <= radius. No data."""
    return project_code(torch.randn(shape.model.code_dim, generator=generator), radius)


def project_code(code: Tensor, radius: float) -> Tensor:
    """The nearest code with |v| <= radius."""
    norm = torch.linalg.vector_norm(code)
    return torch.where(norm > radius, code * (radius / norm), code)  # no answer that a GPU would be waited for


@dataclass(frozen=True)
class Generated:
    """What the hypernetwork makes from a code (Eq. 2): the decoder's rows by their features, and the class priors.

    Attributes:
        layers: Φ at the code's features (d_t,), from which d(v) and shift(v) follow linearly.
        prior_mean: (K, d_z).
        prior_log_scale: (K, d_z).
    """

    layers: PlainLayers
    prior_mean: Tensor
    prior_log_scale: Tensor


def generate(shape: GeneratorShape, params: Tensors, code: Tensor | None) -> Generated:
    """H(v) = (θ, ω): code (d_v,) or None -> decoder rows and class priors (Eqs. 2-4)."""
    layers = PlainLayers.at(params, code)
    if shape.model.latent_dim == 0:
        empty = params["class_bias.weight"].new_zeros(shape.num_classes, 0)
        return Generated(layers, empty, empty)
    one_hot = torch.eye(shape.num_classes, dtype=params["class_bias.weight"].dtype)
    return Generated(layers, *class_prior(layers, one_hot))  # Eq. (2)


def decode(shape: GeneratorShape, layers: Layers, latent: Tensor, one_hot: Tensor) -> Tensor:
    """Mean of the decoder's Gaussian, p(x | z, y) (Eqs. 2-3).

    Args:
        shape: public sizes.
        layers: Φ at a code.
        latent: z, (..., d_z).
        one_hot: y, (..., K).

    Returns:
        (..., d_x), around the released centre.
    """
    hidden = latent
    for layer in range(shape.num_layers - 1):
        hidden = functional.silu(layers.row_scaled(f"decoder.{layer}", hidden))
    return layers.row_scaled(shape.output_layer, hidden, one_hot, shape.observation_variance)


def class_prior(layers: Layers, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation of the class prior p(z | y) (Eq. 4).

    Args:
        layers: Φ at a code.
        one_hot: y, (..., K).

    Returns:
        Two (..., d_z) tensors; the log standard deviation lies within +-LOG_SCALE_BOUND.
    """
    embedding = layers.linear("prior.embedding", one_hot)
    if layers.code is not None:
        trunk = torch.tanh(layers.linear("prior.trunk", layers.code))
        embedding = torch.cat([trunk.expand(*embedding.shape[:-1], -1), embedding], -1)
    # Eq. (4)
    mean, raw = layers.linear("prior.head", embedding).chunk(2, -1)
    return mean, LOG_SCALE_BOUND * torch.tanh(raw / LOG_SCALE_BOUND)


def prior_of(shape: GeneratorShape, generated: Generated, labels: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the prior of rows, (n, d_z) each, by their labels and what these are as y."""
    if not shape.findings:
        return generated.prior_mean[labels], torch.exp(generated.prior_log_scale)[labels]
    if shape.model.latent_dim == 0:
        return (one_hot.new_zeros(len(labels), 0),) * 2
    mean, log_scale = class_prior(generated.layers, one_hot)
    return mean, torch.exp(log_scale)


def class_scores(shape: GeneratorShape, layers: Layers, embeddings: Tensor) -> Tensor:
    """Log posterior of the classes, up to a constant, at embeddings around the centre: (..., d_x) -> (..., K)."""
    return layers.class_logits(shape.output_layer, embeddings, shape.class_bias_scale)


def score_head(shape: GeneratorShape, layers: PlainLayers) -> tuple[Tensor, Tensor]:
    """`class_scores` as a linear head around the centre: weight (K, d_x), bias (K,)."""
    at_centre = layers.params["class_bias.weight"].new_zeros(1, shape.dim)
    offset = class_scores(shape, layers, at_centre)[0]
    axes = torch.eye(shape.dim, dtype=offset.dtype)
    return (class_scores(shape, layers, axes) - offset).T, offset


def project_spectral_norms(params: Tensors, bound: float) -> dict[str, Tensor]:
    """Φ with the spectral norm of each hypernetwork head brought to at most `bound` (Eq. 5; touches no data)."""
    projected = dict(params)
    for name in hypernetwork_heads(params):
        norm = torch.linalg.matrix_norm(params[name], ord=2)
        if bool(norm > bound):
            projected[name] = params[name] * (bound / norm)  # Eq. (5)
    return projected


def hypernetwork_heads(params: Tensors) -> list[str]:
    """Names of the matrices that read a code: what Lipschitz control acts on."""
    ends = (".row_scale", ".bias_shift", "class_shift.weight", "trunk.weight", "prior.head.weight")
    return [name for name in params if name.endswith(ends)]
