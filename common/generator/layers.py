"""The generator's layers over named parameters: one protocol for plain layers and for those that a `Tape` records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

Tensors = Mapping[str, Tensor]

# rows from which BLAS multiplies them all in one way
_ENOUGH_ROWS = 32


class Layers(Protocol):
    """Layers by name, at a site's code: plain parameters, or a `Tape`."""

    @property
    def code(self) -> Tensor | None:
        """The code as an input of a layer, (..., d_v); None without one."""
        ...

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        """`inputs` (..., c) through `name.weight` (r, c) and, if there is one, `name.bias` (r,): (..., r)."""
        ...

    def row_scaled(self, name: str, inputs: Tensor, one_hot: Tensor | None = None, class_scale: float = 1.0) -> Tensor:
        """The row-scaled layer (Eq. 3), d(v) * (W a + s C y) + b + shift(v).

        Args:
            name: prefix of the layer's parameters.
            inputs: a, (..., c).
            one_hot: y, (..., K), where the layer has a column C for each class; else None.
            class_scale: s, a public factor of the class columns.

        Returns:
            (..., r).
        """
        ...

    def class_logits(self, name: str, inputs: Tensor, bias_scale: float) -> Tensor:
        """Scores of classes from the label columns of the last layer, (d(v) * x) C + bias.

        Args:
            name: the last layer's prefix.
            inputs: x, (..., r).
            bias_scale: public factor of the class biases.

        Returns:
            (..., K).
        """
        ...


@dataclass(frozen=True)
class PlainLayers:
    """Layers straight from parameters, with autograd's own gradients.

    Attributes:
        params: by name.
        code: (d_v,), or None.
        features: (d_t,), what the hypernetwork's heads read of the code; None without one.
    """

    params: Tensors
    code: Tensor | None = None
    features: Tensor | None = None

    @classmethod
    def at(cls, params: Tensors, code: Tensor | None) -> PlainLayers:
        """The layers at a code, (d_v,); without one where there is none or it has no width."""
        return cls(params) if code is None or code.numel() == 0 else cls(params, code, code_features(params, code))

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        """See `Layers`."""
        return linear(inputs, self.params[f"{name}.weight"], self.params.get(f"{name}.bias"))

    def row_scaled(self, name: str, inputs: Tensor, one_hot: Tensor | None = None, class_scale: float = 1.0) -> Tensor:
        """See `Layers`."""
        return row_scaled_layer(self.params, name, self.features, inputs, one_hot, class_scale)[2]

    def class_logits(self, name: str, inputs: Tensor, bias_scale: float) -> Tensor:
        """See `Layers`."""
        return class_score_layer(self.params, name, self.features, inputs, bias_scale)[2]


def code_features(params: Tensors, code: Tensor) -> Tensor:
    """What the hypernetwork's heads read: the code, or the trunk's output on it, (d_t,)."""
    if "trunk.weight" in params:
        return torch.tanh(functional.linear(code, params["trunk.weight"], params["trunk.bias"]))
    return code


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`inputs` (..., c) through `weight` (r, c) and `bias` (r,), with rows of zeros where there are few.

    BLAS multiplies few rows in another way, which rounds otherwise: one unit more would change the scores of all others
    by a rounding, and large parameters, which a server chooses, make much of it. With enough rows none of the others
    changes on processors with AVX-512, and mostly the last few with AVX2, as where nonlinear functions take the end of
    an array another way; no library promises it.
    """
    rows = math.prod(inputs.shape[:-1])
    if rows == 0 or rows >= _ENOUGH_ROWS:
        return functional.linear(inputs, weight, bias)
    padded = functional.pad(inputs.reshape(rows, inputs.shape[-1]), (0, 0, 0, _ENOUGH_ROWS - rows))
    return functional.linear(padded, weight, bias)[:rows].view(*inputs.shape[:-1], weight.shape[0])


def generated_rows(params: Tensors, name: str, features: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The row scale d(v) (r,) and bias b + shift(v) (r,) of a row-scaled layer (Eq. 3); no scale without a code."""
    bias = params[f"{name}.base_bias"]
    if features is None:
        return None, bias
    return 1.0 + params[f"{name}.row_scale"] @ features, bias + params[f"{name}.bias_shift"] @ features


def row_scaled_layer(
    params: Tensors,
    name: str,
    features: Tensor | None,
    inputs: Tensor,
    one_hot: Tensor | None = None,
    class_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One row-scaled layer; see `Layers.row_scaled`. Returns (before scaling, row scale or None, output)."""
    scaled = linear(inputs, params[f"{name}.base_weight"])
    if one_hot is not None:
        scaled = scaled + class_scale * linear(one_hot, params[f"{name}.class_weight"])
    row_scale, bias = generated_rows(params, name, features)
    # Eq. (3)
    out = scaled + bias if row_scale is None else torch.addcmul(bias, scaled, row_scale)
    return scaled, row_scale, out


def class_score_layer(
    params: Tensors, name: str, features: Tensor | None, inputs: Tensor, bias_scale: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Class scores from the label columns; see `Layers.class_logits`. Returns (row scale, scaled inputs, scores)."""
    row_scale, _ = generated_rows(params, name, features)
    scaled = inputs if row_scale is None else inputs * row_scale
    bias = params["class_bias.weight"]
    if features is not None:
        bias = bias + params["class_shift.weight"] @ features
    return row_scale, scaled, pull_back(scaled, params[f"{name}.class_weight"]) + bias_scale * bias


def pull_back(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight`, (..., r), (r, c) -> (..., c): a narrow matrix laid out by columns costs BLAS a fifth."""
    return linear(rows, weight.T.contiguous())
