"""The factors of every unit's gradient: what a backward pass hands to `clipping.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor


@dataclass
class GradientFactors:
    """Factors of every unit's gradient, by parameter.

    `outer[name]` holds pairs (left (U, R, r), right (U, R, c)): the unit's gradient is the sum over pairs and rows of
    left x right. `vectors[name]` holds (U, r) arrays that add up to the unit's gradient. `shared[name]` holds pairs
    (left (U, r), right (c,)) whose right side is the same for every unit, such as the code's features.
    """

    outer: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    vectors: dict[str, list[Tensor]] = field(default_factory=dict)
    shared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add_outer(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add outer products to a matrix parameter's gradient."""
        self.outer.setdefault(name, []).append((left, right))

    def add_shared(self, name: str, left: Tensor, right: Tensor, *, owned: bool = False) -> None:
        """Add an outer product with the one right side of that parameter: lefts of several calls are added.

        With `owned` nothing else reads any left of this name, and the sum is written into the first: no copy more.
        """
        if name in self.shared:
            earlier = self.shared[name][0]
            left = earlier.add_(left) if owned else earlier + left
        self.shared[name] = (left, right)

    def add_vector(self, name: str, value: Tensor) -> None:
        """Add one vector a unit to a vector parameter's gradient."""
        self.vectors.setdefault(name, []).append(value)

    def tensors(self) -> Iterator[Tensor]:
        """Every factor."""
        yield from chain.from_iterable(chain.from_iterable(self.outer.values()))
        yield from chain.from_iterable(self.vectors.values())
        yield from chain.from_iterable(self.shared.values())
