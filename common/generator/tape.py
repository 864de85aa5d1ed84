"""Layers that remember what their per-unit gradients are made of.

The gradient that one privacy unit (a record, or a patient with several) sends into a linear layer is a sum of outer
products of two small vectors. A `Tape` runs the layers forward and keeps those vectors, so that `clipping.py` can
compute every unit's gradient norm and the clipped sum of all gradients without ever holding one copy of the
parameters per unit ("book-keeping", Bu et al. 2023).

Shapes: U units, R rows a unit (records of a patient; 1 for record-level privacy), then features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.generator.layers import Tensors, class_score_layer, code_features, linear, pull_back, row_scaled_layer
from common.privacy.factors import GradientFactors


@dataclass(frozen=True)
class _Linear:
    name: str
    inputs: Tensor
    out: Tensor
    bias: bool


@dataclass(frozen=True)
class _RowScaled:
    name: str
    inputs: Tensor
    one_hot: Tensor | None
    class_scale: float
    scaled: Tensor
    row_scale: Tensor | None
    out: Tensor


@dataclass(frozen=True)
class _ClassLogits:
    name: str
    inputs: Tensor
    scaled: Tensor
    row_scale: Tensor | None
    bias_scale: float
    out: Tensor


class Tape:
    """Runs layers on batches of units and records the factors of their gradients.

    Args:
        params: parameters by name; they take no gradient here.
        code: (d_v,), the site's code, or None.
        units: U, the number of units in the batch.
        frozen: prefixes of parameters whose gradients are not wanted (an encoder that never sees a record).
    """

    def __init__(self, params: Tensors, code: Tensor | None, units: int, frozen: Sequence[str] = ()) -> None:
        self._params = params
        self._frozen = tuple(frozen)
        self._linear: list[_Linear] = []
        self._row_scaled: list[_RowScaled] = []
        self._logits: list[_ClassLogits] = []
        self._code = code.detach() if code is not None and code.numel() > 0 else None
        # computed once from the code alone: no unit has a part in what all units share
        self.features: Tensor | None = None
        self.code_rows: Tensor | None = None
        if self._code is not None:
            self.features = code_features(params, self._code)
            # one row a unit, so that autograd hands back one gradient a unit
            self.code_rows = self._code.expand(units, -1).clone().requires_grad_()

    @property
    def code(self) -> Tensor | None:
        """The code of every unit, (U, 1, d_v); None without one."""
        return None if self.code_rows is None else self.code_rows[:, None]

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        """`inputs` (U, R, c) through the parameters `name.weight` (r, c) and, if there is one, `name.bias` (r,)."""
        bias = self._params.get(f"{name}.bias")
        out = linear(inputs, self._params[f"{name}.weight"], bias)
        if name.startswith(self._frozen) and self._frozen:
            return out
        out = out if out.requires_grad else out.requires_grad_()
        self._linear.append(_Linear(name, inputs.detach(), out, bias is not None))
        return out

    def row_scaled(self, name: str, inputs: Tensor, one_hot: Tensor | None = None, class_scale: float = 1.0) -> Tensor:
        """See `Layers`; (U, R, c) -> (U, R, r)."""
        scaled, row_scale, out = row_scaled_layer(self._params, name, self.features, inputs, one_hot, class_scale)
        out = out if out.requires_grad else out.requires_grad_()
        self._row_scaled.append(
            _RowScaled(name, inputs.detach(), one_hot, class_scale, scaled.detach(), row_scale, out)
        )
        return out

    def class_logits(self, name: str, inputs: Tensor, bias_scale: float) -> Tensor:
        """See `Layers`; (U, R, r) -> (U, R, K)."""
        row_scale, scaled, out = class_score_layer(self._params, name, self.features, inputs, bias_scale)
        out = out.requires_grad_()
        self._logits.append(_ClassLogits(name, inputs, scaled, row_scale, bias_scale, out))
        return out

    def factors(self, losses: Tensor) -> GradientFactors:
        """Backpropagate the sum of per-unit losses once, down to the layers' outputs, and collect the factors.

        Args:
            losses: (U,), one loss a unit; each may depend on its own unit alone.

        Returns:
            The factors of all recorded parameters, and those of the code under "code".
        """
        nodes: list[_Linear | _RowScaled | _ClassLogits] = [*self._linear, *self._row_scaled, *self._logits]
        outs = [node.out for node in nodes]
        wanted = outs if self.code_rows is None else [*outs, self.code_rows]
        grads: Sequence[Tensor | None] = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        result = GradientFactors()
        for node, grad in zip(nodes, grads[: len(nodes)], strict=True):
            if grad is None:
                continue
            if isinstance(node, _Linear):
                _add_linear(result, node, grad)
            elif isinstance(node, _RowScaled):
                self._add_row_scaled(result, node, grad)
            else:
                self._add_class_logits(result, node, grad)
        if self.code_rows is not None:
            code_grad = torch.zeros_like(self.code_rows) if grads[-1] is None else grads[-1]
            pulled = [pull_back(left, self._params[name]) for name, (left, _) in result.shared.items()]
            if pulled:
                code_grad = code_grad + self._through_trunk(torch.stack(pulled).sum(0), result)
            result.add_vector("code", code_grad)
        return result

    def _add_row_scaled(self, result: GradientFactors, layer: _RowScaled, grad: Tensor) -> None:
        """Factors of a row-scaled layer, and of the heads that make its row scale and bias shift."""
        weighted = grad if layer.row_scale is None else grad * layer.row_scale
        result.add_outer(f"{layer.name}.base_weight", weighted, layer.inputs)
        if layer.one_hot is not None:
            result.add_outer(f"{layer.name}.class_weight", weighted, layer.one_hot * layer.class_scale)
        total = _over_rows(grad)
        result.add_vector(f"{layer.name}.base_bias", total)
        if layer.row_scale is not None and self.features is not None:
            # in place: the graph is gone, and nothing else reads what the scale acted on
            scale_grad = _over_rows(layer.scaled.mul_(grad))
            result.add_shared(f"{layer.name}.row_scale", scale_grad, self.features, owned=True)
            result.add_shared(f"{layer.name}.bias_shift", total, self.features)

    def _add_class_logits(self, result: GradientFactors, scores: _ClassLogits, grad: Tensor) -> None:
        """Factors of the class scores, and of the heads that make their row scale and shift."""
        result.add_outer(f"{scores.name}.class_weight", scores.scaled, grad)
        bias_grad = scores.bias_scale * _over_rows(grad)
        result.add_vector("class_bias.weight", bias_grad)
        if scores.row_scale is not None and self.features is not None:
            pulled = linear(grad, self._params[f"{scores.name}.class_weight"])
            scale_grad = _over_rows(pulled.mul_(scores.inputs))
            result.add_shared(f"{scores.name}.row_scale", scale_grad, self.features, owned=True)
            result.add_shared("class_shift.weight", bias_grad, self.features)

    def _through_trunk(self, features_grad: Tensor, result: GradientFactors) -> Tensor:
        """Carry the gradient of the features through the trunk, if there is one, to the code: (U, d_t) -> (U, d_v)."""
        if self._code is None or self.features is None or "trunk.weight" not in self._params:
            return features_grad
        inner = features_grad * (1.0 - self.features.square())  # tanh' = 1 - tanh^2
        result.add_shared("trunk.weight", inner, self._code)
        result.add_vector("trunk.bias", inner)
        return pull_back(inner, self._params["trunk.weight"])


def _over_rows(values: Tensor) -> Tensor:
    """Sum over a unit's records: (U, R, r) -> (U, r)."""
    return values[:, 0] if values.shape[1] == 1 else values.sum(1)


def _add_linear(result: GradientFactors, node: _Linear, grad: Tensor) -> None:
    result.add_outer(f"{node.name}.weight", grad, node.inputs)
    if node.bias:
        result.add_vector(f"{node.name}.bias", grad.sum(1))
