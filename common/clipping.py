"""Clipped sums of per-unit gradients: the only place that reads gradients of real records.

A unit is a record, or a patient with several records (their gradients are added before clipping). Every parameter
that ever leaves a site or persists at it is part of one vector a unit, clipped as one:

    G = sum over units of g_u * min(1, C / |g_u|)

Adding or removing one unit changes G by at most C in the Euclidean norm, whatever the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from common.tape import GradientFactors

NEIGHBOURING = "add or remove one unit"
# Share of the largest possible squared norm that is added to a Gram norm. float32 sums err by about 1e-6 of it; with
# this margin a clipped unit's rounded contribution exceeds C by less than 1e-5 of C even under full cancellation.
_CANCELLATION_MARGIN = 1e-4
# Squares of float32 numbers under- and overflow float32: a tiny factor beside a huge one would count as no gradient.
# While no factor is longer than 10^6, what underflow loses is below 10^-15; beyond, norms are computed in float64.
_SAFE_SQUARE = 1e12


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped vectors, not yet noised.

    Attributes:
        tensors: the sum, by parameter name.
        sensitivity: the most that adding or removing one unit changes the sum, in the joint Euclidean norm.
        neighbouring: the relation that the sensitivity is for.
    """

    tensors: dict[str, Tensor]
    sensitivity: float
    neighbouring: str = NEIGHBOURING


def clipped_gradient_sum(
    factors: GradientFactors | Iterable[GradientFactors],
    shapes: Mapping[str, torch.Size | tuple[int, ...]],
    clip_norm: float,
) -> ClippedSum:
    """Clip every unit's whole gradient to `clip_norm` and add them up, without per-unit copies of the parameters.

    Args:
        factors: what the units' gradients are made of, see `tape.GradientFactors`. U may be 0. Many units may come in
            several parts, one after the other; each unit lies whole in one of them, or it would be clipped twice.
        shapes: shape of every parameter of the vector; one that got no gradient is a zero in the sum.
        clip_norm: C > 0; may be infinite in a run without a guarantee.

    Returns:
        The sum; its sensitivity is C for adding or removing one unit. A unit whose gradient is not finite
        contributes zero.

    Raises:
        ConfigError: "clip norm must be above 0, found ...".
        ConfigError: "gradient of unknown parameter ..." if factors name a parameter that is not in `shapes`.

    Source: Abadi et al. (2016); norms from factors: Goodfellow (2015), rows of a unit by Gram matrices: Bu et al.
        (2023). Departs from Eq. 9 of the paper: a sum instead of a mean, over Φ and the code as one vector.
    """
    if not clip_norm > 0:
        raise ConfigError(f"clip norm must be above 0, found {clip_norm}")
    total: dict[str, Tensor] = {}
    for part in (factors,) if isinstance(factors, GradientFactors) else factors:
        unknown = (set(part.outer) | set(part.vectors) | set(part.shared)) - set(shapes)
        if unknown:
            raise ConfigError(
                f"gradient of unknown parameter {sorted(unknown)[0]}: it would not be clipped with the rest"
            )
        _add_clipped(part, clip_norm, total)
    return ClippedSum(
        {name: total[name].contiguous() if name in total else torch.zeros(shape) for name, shape in shapes.items()},
        clip_norm,
    )


def _add_clipped(factors: GradientFactors, clip_norm: float, total: dict[str, Tensor]) -> None:
    """Add the clipped gradients of these units to `total`, by parameter."""
    squared = unit_squared_norms(factors)
    if squared is None:
        return
    finite = torch.isfinite(squared)
    scale = torch.ones_like(squared)
    if math.isfinite(clip_norm):
        scale = (clip_norm / squared.sqrt()).clamp(max=1.0)
    keep = None
    if not bool(finite.all()):
        scale, keep = scale[finite], finite
    _add_weighted(factors, scale.to(_dtype(factors)), keep, total)


def unit_squared_norms(factors: GradientFactors) -> Tensor | None:
    """Squared Euclidean norm of every unit's whole gradient, (U,) float64; None if there are no factors."""
    lengths = _Lengths(torch.float32)
    parts = _squared_norms(factors, lengths)
    if not lengths.are_safe():
        parts = _squared_norms(factors, _Lengths(torch.float64))
    return torch.stack(parts).sum(0) if parts else None


def clipped_vector_sum(vectors: Tensor, clip_norm: float) -> ClippedSum:
    """Sum of rows clipped to `clip_norm`, for releases whose per-unit vector is small enough to hold.

    Args:
        vectors: (U, p), one row a unit.
        clip_norm: C > 0.

    Returns:
        {"sum": (p,)}; sensitivity C for adding or removing one unit. Rows that are not finite contribute zero.
    """
    if not clip_norm > 0:
        raise ConfigError(f"clip norm must be above 0, found {clip_norm}")
    vectors = vectors.double()
    finite = torch.isfinite(vectors).all(1, keepdim=True)
    vectors = torch.where(finite, vectors, torch.zeros_like(vectors))
    scale = (clip_norm / torch.linalg.vector_norm(vectors, dim=1)).clamp(max=1.0)
    return ClippedSum({"sum": scale.nan_to_num(1.0) @ vectors}, clip_norm)


def _dtype(factors: GradientFactors) -> torch.dtype:
    """Type of the factors, and so of the sum."""
    for pairs in factors.outer.values():
        return pairs[0][0].dtype
    for values in factors.vectors.values():
        return values[0].dtype
    for left, _ in factors.shared.values():
        return left.dtype
    return torch.get_default_dtype()


def _total(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


class _Lengths:
    """Squared lengths of factors, each computed once though several parameters may share a factor."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # the factor is kept beside its length: an id is free again once its tensor is gone
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def squared(self, rows: Tensor) -> Tensor:
        """(..., d) -> (...) float64."""
        key = id(rows)
        if key not in self._known:
            self._known[key] = (rows, torch.linalg.vector_norm(rows.to(self.dtype), dim=-1).square().double())
        return self._known[key][1]

    def are_safe(self) -> bool:
        """Whether no factor is so long that float32 squares could lose another; NaN is not safe."""
        values = torch.cat([value.flatten() for _, value in self._known.values()]) if self._known else torch.zeros(0)
        return values.numel() == 0 or bool(values.max() <= _SAFE_SQUARE)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products of rows, (..., d), (..., d) -> (...) float64."""
        return (left.to(self.dtype) * right.to(self.dtype)).sum(-1).double()


def _squared_norms(factors: GradientFactors, lengths: _Lengths) -> list[Tensor]:
    """What each parameter adds to the units' squared norms, (U,) each."""
    parts = [_outer_squared_norm(pairs, lengths) for pairs in factors.outer.values()]
    parts += [lengths.squared(left) * lengths.squared(right) for left, right in factors.shared.values()]
    parts += [lengths.squared(values[0] if len(values) == 1 else _total(values)) for values in factors.vectors.values()]
    return parts


def _outer_squared_norm(pairs: list[tuple[Tensor, Tensor]], lengths: _Lengths) -> Tensor:
    """|sum over pairs and rows of left x right|^2 a unit: (U, R, r), (U, R, c) each -> (U,)."""
    each = [lengths.squared(left) * lengths.squared(right) for left, right in pairs]
    if len(pairs) == 1 and pairs[0][0].shape[1] == 1:
        return each[0][:, 0]
    if all(left.shape[1] == 1 for left, _ in pairs):
        exact = _total([value[:, 0] for value in each])
        for index, (left, right) in enumerate(pairs):
            for other_left, other_right in pairs[:index]:
                product = lengths.inner(left, other_left) * lengths.inner(right, other_right)
                exact = exact + 2.0 * product[:, 0]
    else:
        # sum over row pairs of (left_i . left_j)(right_i . right_j): no (r, c) matrix a unit is formed
        lefts = torch.cat([left for left, _ in pairs], 1).to(lengths.dtype)
        rights = torch.cat([right for _, right in pairs], 1).to(lengths.dtype)
        exact = ((lefts @ lefts.mT).double() * (rights @ rights.mT).double()).sum((1, 2))
    # rows that nearly cancel leave a norm below the rounding error of the sum itself: never underestimate it
    largest = torch.cat(each, 1).sqrt().sum(1).square()
    return exact.clamp(min=0.0) + _CANCELLATION_MARGIN * largest


def _add_weighted(factors: GradientFactors, weight: Tensor, keep: Tensor | None, total: dict[str, Tensor]) -> None:
    """Add up weight x gradient over units, by parameter; units outside `keep` are left out, and have no weight."""

    def kept(value: Tensor) -> Tensor:
        return value if keep is None else value[keep]

    def add(name: str, value: Tensor) -> None:
        total[name] = total[name].add_(value) if name in total else value

    for name, pairs in factors.outer.items():
        for left, right in pairs:
            # The weight goes to the narrower side, and that side's rows become the product's: the other way round,
            # matrices with a few columns cost BLAS five times as much.
            flip = left.shape[2] > right.shape[2]
            narrow, wide = (right, left) if flip else (left, right)
            narrow = (kept(narrow) * weight[:, None, None]).flatten(0, 1).T
            wide = kept(wide).flatten(0, 1)
            if name in total:
                (total[name].T if flip else total[name]).addmm_(narrow, wide)
            else:
                product = narrow @ wide
                total[name] = product.T if flip else product
    for name, values in factors.vectors.items():
        for value in values:
            add(name, weight @ kept(value))
    for name, (left, right) in factors.shared.items():
        add(name, torch.outer(weight @ kept(left), right))
