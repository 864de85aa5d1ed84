"""How the factors of units are measured and summed: one by one on a processor, all in one matrix on a GPU.

On a processor numbers that stay in its cache are cheap, and a launch costs nothing. On a GPU a launch costs more than
what it computes: what is done to each factor, a length, a mask, a weight, a sum over units, is done once to all of them
as columns of one matrix. Nothing there waits for the device either: a unit that contributes zero is not left out, which
would need its place on the host, but its numbers are set to zero.

The rules and the rounding are those of `clipping.py` in both. A squared length is a sum of rounded squares in any
order, to which products with zeros add nothing. A number that is not finite makes lengths of its own unit infinite or
NaN, and of no other: a unit is a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import chain, repeat
from typing import Protocol

import torch
from torch import Tensor

from common.privacy.factors import GradientFactors


class Units(Protocol):
    """Some units' factors, as sums over units read them."""

    flips: bool
    """Whether a matrix with a few columns is better made as its transpose."""

    def rows(self, value: Tensor) -> Tensor:
        """Of a factor (U, R, w), the rows of these units."""
        ...

    def weighed(self, value: Tensor) -> Tensor:
        """As `rows`, each unit's times its weight."""
        ...

    def summed(self, value: Tensor) -> Tensor:
        """Weighted sum over these units: (U, w) -> (w,)."""
        ...

    def shared(self, value: Tensor) -> Tensor:
        """A factor (w,) of all units, as it multiplies a sum over these: where none contributes, the product is 0."""
        ...


class EachFactor:
    """Squared lengths of factors, each computed once though several parameters may share a factor."""

    def __init__(self) -> None:
        self.widest, self.rows = 0, 1
        # the factor is kept beside its length: an id is free again once its tensor is gone
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def squared(self, rows: Tensor) -> Tensor:
        """(..., d) -> (...) float64."""
        key = id(rows)
        if key not in self._known:
            # the last axis by its number: torch 2.11 keeps an axis of one number on the meta device where it is -1
            lengths = torch.linalg.vector_norm(rows, dim=rows.ndim - 1)
            self._known[key] = (rows, lengths.double().square())
            self.widest = max(self.widest, rows.shape[-1])
        return self._known[key][1]

    def longest(self, units: int) -> Tensor:
        """The largest squared length among each unit's factors, those that all units share among them: (U,).

        NaN where one is NaN.
        """
        values = (value for _, value in self._known.values())
        columns = [v if v.ndim == 2 else v[:, None] if v.ndim else v.expand(units, 1) for v in values]
        return torch.cat(columns, 1).amax(1)

    def parts(self, weight: Tensor, usable: Tensor, most: int) -> Iterator[Units]:
        """The usable units with their weights, at most so many at a time."""
        places = None
        if not bool(usable.all()):
            weight, places = weight[usable], usable.nonzero()[:, 0]
        for start in range(0, max(len(weight), 1), most):
            block = slice(start, start + most)
            yield _Chosen(weight[block], block if places is None else places[block])


class _Chosen:
    """See `Units`."""

    # matrices with a few columns cost BLAS five times as much
    flips = True

    def __init__(self, weight: Tensor, keep: Tensor | slice) -> None:
        self._weight, self._keep = weight, keep

    def rows(self, value: Tensor) -> Tensor:
        return value[self._keep]

    def weighed(self, value: Tensor) -> Tensor:
        return value[self._keep] * self._weight[:, None, None]

    def summed(self, value: Tensor) -> Tensor:
        return self._weight @ value[self._keep]

    def shared(self, value: Tensor) -> Tensor:
        return value if self._weight.numel() else torch.zeros_like(value)


class AllFactors:
    """As `EachFactor`, of every factor at once.

    Args:
        factors: of the units; at least one.
        vectors: the sum of each of `factors.vectors`, by parameter.
    """

    def __init__(self, factors: GradientFactors, vectors: Mapping[str, Tensor]) -> None:
        summed = replace(factors, vectors={name: [value] for name, value in vectors.items()})
        each = list({id(value): value for value in summed.tensors()}.values())
        units = each[0].shape[0]
        # (U, sum of widths); what all units share is a factor of each of them
        flat = [value.flatten(1) if value.ndim > 1 else value.expand(units, -1) for value in each]
        self._matrix = torch.cat(flat, 1)
        rows = [value.shape[1] if value.ndim == 3 else 1 for value in each]
        widths = tuple(chain.from_iterable(repeat(v.shape[-1], r) for v, r in zip(each, rows, strict=True)))
        segments = _segments(widths, self._matrix.dtype, self._matrix.device)
        self._squared = (self._matrix.square() @ segments).double()
        self.widest, self.rows = max(widths), 1
        # where a factor lies among the lengths and in the matrix; the factor is kept as in `EachFactor`
        self._places: _Places = {}
        row = column = 0
        for value, count, part in zip(each, rows, flat, strict=True):
            self._places[id(value)] = value, slice(row, row + count), slice(column, column + part.shape[1])
            row, column = row + count, column + part.shape[1]

    def squared(self, rows: Tensor) -> Tensor:
        """See `EachFactor.squared`; (U,) of a factor that all units share."""
        found = self._squared[:, self._places[id(rows)][1]]
        return found if rows.ndim == 3 else found[:, 0]

    def longest(self, units: int) -> Tensor:
        """See `EachFactor.longest`."""
        return self._squared.amax(1)

    def parts(self, weight: Tensor, usable: Tensor, most: int) -> Iterator[Units]:
        """All units with their weights, at most so many at a time; those that are not usable are zero."""
        self._matrix.masked_fill_(~usable[:, None], 0.0)
        for start in range(0, max(len(weight), 1), most):
            block = slice(start, start + most)
            yield _Columns(self._places, self._matrix[block], weight[block])


_Places = dict[int, tuple[Tensor, slice, slice]]


class _Columns:
    """See `Units`."""

    flips = False

    def __init__(self, places: _Places, matrix: Tensor, weight: Tensor) -> None:
        self._places, self._matrix = places, matrix
        self._weighed, self._summed = matrix * weight[:, None], weight @ matrix
        self._shared: dict[int, Tensor] = {}

    def rows(self, value: Tensor) -> Tensor:
        return self._of(self._matrix, value)

    def weighed(self, value: Tensor) -> Tensor:
        return self._of(self._weighed, value)

    def summed(self, value: Tensor) -> Tensor:
        return self._summed[self._places[id(value)][2]]

    def shared(self, value: Tensor) -> Tensor:
        if id(value) not in self._shared:
            # one that is not finite has made zeros of all units
            self._shared[id(value)] = value.nan_to_num(0.0, 0.0, 0.0)
        return self._shared[id(value)]

    def _of(self, matrix: Tensor, value: Tensor) -> Tensor:
        return matrix[:, self._places[id(value)][2]].unflatten(1, value.shape[1:])


@lru_cache(maxsize=16)
def _segments(widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(sum of widths, segments): a product with it adds up each segment's columns."""
    eye = torch.eye(len(widths), dtype=dtype, device="cpu")
    return eye.repeat_interleave(torch.tensor(widths, device="cpu"), 0).to(device)
