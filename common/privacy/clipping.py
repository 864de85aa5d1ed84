"""Clipped sums of per-unit gradients: where a run has a guarantee, the only place that reads gradients of records.

A unit is a record, or a patient with several records (their gradients are added before clipping). Every parameter
that ever leaves a site or persists at it is part of one vector a unit, clipped as one:

    G = sum over units of g_u * min(1, C / |g_u|)

Adding or removing one unit changes G by at most C in the Euclidean norm, whatever the data. In floats, with u = 2^-24:

**No sum fails.** A unit with a factor longer than `FACTOR_BOUND`, or not finite, contributes zero: a rule for each unit
by itself, of what is summed and nothing else. Of all others an entry of a product of factors is at most 10^12, so sums
over up to 10^26 rows of units stay finite. The rule holds for lengths, not for the norm: a long factor beside a zero
one has no norm, and its sum would overflow all the same.

**No unit adds more than C.** Let the widest factor have d numbers, and a unit at most n rows. Whatever the order of
summation, a squared length in float32 errs by less than (d + 2) u of it, so |g_u| by less than (d + 4) u; the weight,
its product with a factor, and the product of the factors add 3 u. The weight pays for all of it: it is
C / (|g_u| (1 + (d + n + 8) u)), or 1. On a GPU this needs products of float32, not of TensorFloat-32, which
`devices.computing_on` sees to; sums have another order there (`unit_factors.py`). Rows that nearly cancel are in
`_outer_squared_norm`. What underflow loses, or a processor that flushes subnormal numbers to zero, is an absolute
error: below sqrt(d) 2^-63 of a length, hence 10^-13 sqrt(d) of |g_u|, which is nothing beside C >= 10^-6; nor is a
weight, at least 10^-21 then, ever subnormal.

**What is left** is the rounding of sums over units, which no margin pays for. Those of a tile, of at most 4096 rows,
are added up in float32, and tiles in float64: a tile of n rows errs by less than n u of the sum of its terms'
magnitudes, in practice by some sqrt(n) u. A unit's terms are C together, or at most `_MOST_CANCELLED` C where it has
several rows or a layer is called more than once. One unit more may round the sum of the others another way, by so much
beyond C. Sums of several tiles stay in float64 until they are noised. The guarantee is for real numbers here, as in
every library that adds floats (Casacuberta et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.bounds import LEAST_CLIP_NORM
from common.errors import ConfigError
from common.privacy.factors import GradientFactors
from common.privacy.unit_factors import AllFactors, EachFactor, Units

NEIGHBOURING = "add or remove one unit"
FACTOR_BOUND = 1e6
"""The longest factor of a unit that may contribute: public. Those of useful steps have lengths of about 1."""
_ROUNDOFF = 2.0**-24  # u, of float32
_MOST_CANCELLED = 16.0
"""A unit's gradient of a parameter counts as at least this part of what its rows could have added up to."""
MOST_ROWS = 4096
"""Rows of units whose sum is in float32: for that of more, rounding grows faster than their number."""


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
        factors: what the units' gradients are made of, see `GradientFactors`. U may be 0. Many units may come in
            several parts, one after the other; each unit lies whole in one of them, or it would be clipped twice.
        shapes: shape of every parameter of the vector; one that got no gradient is a zero in the sum.
        clip_norm: C >= 1e-6; may be infinite in a run without a guarantee.

    Returns:
        The sum, in float64 where it is one of several tiles; its sensitivity is C for adding or removing one unit,
        rounding of the unit's part included. A unit with a factor that is not finite or longer than `FACTOR_BOUND`
        contributes zero.

    Raises:
        ConfigError: "clip norm must be at least 1e-06, found ...".
        ConfigError: "gradient of unknown parameter ..." if factors name a parameter that is not in `shapes`.

    Source: Abadi et al. (2016); norms from factors: Goodfellow (2015), rows of a unit by Gram matrices: Bu et al.
        (2023). Departs from Eq. 9 of the paper: a sum instead of a mean, over Φ and the code as one vector.
    """
    _check_clip_norm(clip_norm)
    total: dict[str, Tensor] = {}
    like = torch.empty(0)
    for part in (factors,) if isinstance(factors, GradientFactors) else factors:
        unknown = (set(part.outer) | set(part.vectors) | set(part.shared)) - set(shapes)
        if unknown:
            raise ConfigError(
                f"gradient of unknown parameter {sorted(unknown)[0]}: it would not be clipped with the rest"
            )
        like = next(part.tensors(), like)
        _add(total, _clipped_part(part, clip_norm))  # Eq. (9), the sum
    zeros = {name: like.new_zeros(shape) for name, shape in shapes.items() if name not in total}
    sums = {name: value.contiguous() for name, value in total.items()} | zeros
    return ClippedSum({name: sums[name] for name in shapes}, clip_norm)


def _check_clip_norm(clip_norm: float) -> None:
    if not clip_norm >= LEAST_CLIP_NORM:
        raise ConfigError(f"clip norm must be at least {LEAST_CLIP_NORM:g}, found {clip_norm}")


def _clipped_part(factors: GradientFactors, clip_norm: float) -> dict[str, Tensor]:
    """The sum of these units' clipped gradients, by parameter."""
    # what is measured is what is summed: parts that cancel are added up before either
    vectors = {name: _total(values) for name, values in factors.vectors.items()}
    lengths = _lengths(factors, vectors)
    squared, rounding = _measure(factors, vectors, lengths)
    if squared is None:
        return {}
    # Eq. (9), min(1, C / |g_u|)
    weight = torch.ones_like(squared)
    if math.isfinite(clip_norm):
        weight = (clip_norm / (1.0 + rounding) / squared.sqrt()).clamp(max=1.0)
    most = max(MOST_ROWS // max((pairs[0][0].shape[1] for pairs in factors.outer.values()), default=1), 1)
    total: dict[str, Tensor] = {}
    for units in lengths.parts(weight.to(next(factors.tensors()).dtype), squared < math.inf, most):
        _add(total, _weighted_sums(factors, vectors, units))
    return total


def _add(total: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add up sums of some units each: in float64 from the second on, as the module's docstring has it."""
    for name, value in sums.items():
        total[name] = total[name].double().add_(value) if name in total else value


def unit_squared_norms(factors: GradientFactors) -> Tensor | None:
    """Squared Euclidean norm of every unit's whole gradient, (U,) float64; None if there are no factors.

    Infinite for a unit that contributes zero: one with a factor that is not finite, or longer than `FACTOR_BOUND`.
    """
    vectors = {name: _total(values) for name, values in factors.vectors.items()}
    return _measure(factors, vectors, _lengths(factors, vectors))[0]


def _lengths(factors: GradientFactors, vectors: Mapping[str, Tensor]) -> EachFactor | AllFactors:
    """What measures the factors where they lie."""
    on_device = any(value.device.type != "cpu" for value in factors.tensors())
    return AllFactors(factors, vectors) if on_device else EachFactor()


def _measure(
    factors: GradientFactors, vectors: Mapping[str, Tensor], lengths: EachFactor | AllFactors
) -> tuple[Tensor | None, float]:
    """`unit_squared_norms`, and the share of a norm that rounding may add to a contribution."""
    parts = [_outer_squared_norm(pairs, lengths) for pairs in factors.outer.values()]
    parts += [lengths.squared(left) * lengths.squared(right) for left, right in factors.shared.values()]
    parts += [lengths.squared(value) for value in vectors.values()]
    if not parts:
        return None, 0.0
    squared = torch.stack(parts).sum(0)
    usable = lengths.longest(squared.shape[0]) <= FACTOR_BOUND**2
    return torch.where(usable, squared, math.inf), (lengths.widest + lengths.rows + 8) * _ROUNDOFF


def clipped_vector_sum(vectors: Tensor, clip_norm: float) -> ClippedSum:
    """Sum of rows clipped to `clip_norm`, for releases whose per-unit vector is small enough to hold.

    Args:
        vectors: (U, p), one row a unit.
        clip_norm: C >= 1e-6.

    Returns:
        {"sum": (p,)}; sensitivity C for adding or removing one unit. Rows that are not finite contribute zero.
    """
    _check_clip_norm(clip_norm)
    vectors = vectors.double()
    finite = torch.isfinite(vectors).all(1, keepdim=True)
    vectors = torch.where(finite, vectors, 0.0)
    # as for gradients, in float64: the norm pays for its own rounding
    norms = torch.linalg.vector_norm(vectors, dim=1) * (1.0 + (vectors.shape[1] + 8) * 2.0**-53)
    return ClippedSum({"sum": (clip_norm / norms).clamp(max=1.0).nan_to_num(1.0) @ vectors}, clip_norm)


def _total(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _outer_squared_norm(pairs: list[tuple[Tensor, Tensor]], lengths: EachFactor | AllFactors) -> Tensor:
    """|sum over pairs and rows of left x right|^2 a unit: (U, R, r), (U, R, c) each -> (U,)."""
    each = [lengths.squared(left) * lengths.squared(right) for left, right in pairs]
    rows = sum(left.shape[1] for left, _ in pairs)
    lengths.rows = max(lengths.rows, rows)
    if rows == 1:
        return each[0][:, 0]
    if all(left.shape[1] == 1 for left, _ in pairs):
        exact = _total([value[:, 0] for value in each])
        for index, (left, right) in enumerate(pairs):
            for other_left, other_right in pairs[:index]:
                product = (left * other_left).sum(-1).double() * (right * other_right).sum(-1).double()
                exact = exact + 2.0 * product[:, 0]
    else:
        # sum over row pairs of (left_i . left_j)(right_i . right_j): no (r, c) matrix a unit is formed
        lefts = torch.cat([left for left, _ in pairs], 1)
        rights = torch.cat([right for _, right in pairs], 1)
        exact = ((lefts @ lefts.mT).double() * (rights @ rights.mT).double()).sum((1, 2))
    # Rows that nearly cancel leave a norm below the rounding error of the sum itself. Float32 products of d numbers err
    # by at most d u of the lengths' product, in any order: with 2 d u of the largest norm the rows could have, the norm
    # is never underestimated. With 2 n u more, what rounding leaves of n rows that cancel, n u of that largest norm,
    # adds less than n u of C.
    widest = max(pairs[0][0].shape[-1], pairs[0][1].shape[-1])
    largest = torch.cat(each, 1).sqrt().sum(1).square()
    exact = exact.clamp(min=0.0) + 2.0 * (widest + rows + 4) * _ROUNDOFF * largest
    # and parts that are far longer than what they add up to would round the sums over units far more than others do
    return torch.maximum(exact, largest / _MOST_CANCELLED**2)


def _weighted_sums(factors: GradientFactors, vectors: Mapping[str, Tensor], units: Units) -> dict[str, Tensor]:
    """Sums of weight x gradient over units, by parameter."""
    sums: dict[str, Tensor] = {}
    for name, pairs in factors.outer.items():
        for left, right in pairs:
            # The weight goes to the narrower side, and that side's rows become the product's where that is cheaper.
            flip = units.flips and left.shape[2] > right.shape[2]
            narrow, wide = (right, left) if flip else (left, right)
            narrow, wide = units.weighed(narrow).flatten(0, 1).T, units.rows(wide).flatten(0, 1)
            if name in sums:
                (sums[name].T if flip else sums[name]).addmm_(narrow, wide)
            else:
                product = narrow @ wide
                sums[name] = product.T if flip else product
    for name, value in vectors.items():
        sums[name] = units.summed(value)
    for name, (left, right) in factors.shared.items():
        sums[name] = torch.outer(units.summed(left), units.shared(right))
    return sums
