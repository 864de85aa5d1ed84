"""What a server may send a site in a round: names, shapes and sizes of the parameters, by public rules alone.

A site trains at whatever parameters it is sent. Checked before anything is charged and before a record is read, so that
what a bad set of parameters does is the same at every site: it is refused. The bounds are generous: no honest run comes
near them, and far below what makes float32 overflow in a network of the greatest depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.bounds import LARGEST_NORM
from common.errors import ConfigError
from common.methods.base import Method, RunContext, Shapes, Tensors

_CONSTANT = "constant."


@dataclass(frozen=True)
class Bound:
    """Largest norm of a tensor, and the interval that holds each of its values."""

    norm: float
    least: float
    most: float

    def allows(self, value: Tensor) -> bool:
        """Whether a tensor lies within; one that is not finite does not."""
        norm = float(torch.linalg.vector_norm(value.flatten(), dtype=torch.float64))
        inside = value.numel() == 0 or (float(value.min()) >= self.least and float(value.max()) <= self.most)
        return norm <= self.norm and inside


def bounds_of(context: RunContext) -> Mapping[str, Bound]:
    """Bounds of what is released or public and not trained, by name; all else is bounded by `LARGEST_NORM`."""
    return {
        # a mean of embeddings of unit length, rounded for the wire
        f"{_CONSTANT}centre": Bound(2.0, -2.0, 2.0),
        f"{_CONSTANT}total": Bound(1e12, 0.0, 1e12),
        # logarithms of shares of at least 1 %, of at most 4,096 classes, with a weight of at most 2
        f"{_CONSTANT}class_offsets": Bound(LARGEST_NORM, -32.0, 32.0),
        f"{_CONSTANT}target": Bound(1e6, -LARGEST_NORM, LARGEST_NORM),
    }


def check_received(context: RunContext, method: Method, site_index: int, tensors: Tensors) -> None:
    """Refuse parameters that the method does not send, or that no honest run reaches.

    Args:
        context: the run.
        method: of the run.
        site_index: of the site in the run.
        tensors: what a site holds after the message: whole parameters, or its last ones with the change applied.

    Raises:
        ConfigError: a name, shape, type or size that is not allowed; nothing was charged.
    """
    check_shapes(tensors, method.received_by(context, site_index))
    known = bounds_of(context)
    for name, value in tensors.items():
        bound = known.get(name, None if name.startswith(_CONSTANT) else _TRAINED)
        if bound is None or not bound.allows(value):
            raise ConfigError(
                f"parameter {name!r} is not finite or beyond its public bound; nothing was charged. In an honest run "
                "the learning rates are too high for so few records: lower them, or set score-noise"
            )


def check_shapes(tensors: Tensors, shapes: Shapes) -> None:
    """Refuse tensors that are not exactly the float32 ones named (ConfigError)."""
    if set(tensors) != set(shapes):
        wrong = sorted(set(tensors) ^ set(shapes))[0]
        raise ConfigError(f"the server must send {len(shapes)} tensors, {wrong!r:.100} is missing or not among them")
    for name, shape in shapes.items():
        value = tensors[name]
        if tuple(value.shape) != tuple(shape) or value.dtype != torch.float32:
            found = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ConfigError(f"parameter {name!r} must be float32 of shape {tuple(shape)}, found {found}")


_TRAINED = Bound(LARGEST_NORM, -LARGEST_NORM, LARGEST_NORM)
