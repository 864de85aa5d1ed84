"""Sites' own classifier models of different shapes, as flat vectors of parameters: what MH-pFedHN generates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from common.methods.base import RunContext


@dataclass(frozen=True)
class Architecture:
    """A linear classifier, or a network of rectified layers: widths of the input, the hidden layers and the classes."""

    dim: int
    hidden: tuple[int, ...]
    num_classes: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters in the order of the flat vector: weight and bias of each layer."""
        layers = pairwise((self.dim, *self.hidden, self.num_classes))
        return tuple(shape for inputs, outputs in layers for shape in ((outputs, inputs), (outputs,)))

    @property
    def size(self) -> int:
        """K_i: number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def unpack(self, theta: Tensor) -> list[Tensor]:
        """The flat vector (size,) as a list of parameters."""
        parts = torch.split(theta, [math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def logits(self, theta: Tensor, features: Tensor) -> Tensor:
        """Class scores (n, K) of features (n, d) under the parameters (size,)."""
        params, hidden = self.unpack(theta), features
        for layer in range(0, len(params), 2):
            hidden = functional.linear(hidden, params[layer], params[layer + 1])
            if layer + 2 < len(params):
                hidden = torch.relu(hidden)
        return hidden


def site_architecture(context: RunContext, site_index: int) -> Architecture:
    """A site's own model: the settings' list is handed out in turn; its input is as wide as the site's embeddings."""
    listed = context.config.rivals.hidden_widths_of
    problem = context.problem
    return Architecture(problem.dim_of(site_index), listed[site_index % len(listed)], problem.num_classes)


def light_architecture(context: RunContext, dim: int) -> Architecture:
    """The light global model for embeddings of one width: linear."""
    return Architecture(dim, (), context.problem.num_classes)
