"""Sums of clipped contributions as integers with a share of the noise, and the sum of all sites back as tensors.

A site maps its sum G (sensitivity S in the Euclidean norm) to integers in three steps, all parameters public:

1. divide by the grid, a power of two of at most S / 2^k; hold every coordinate within +-`limit` (a projection, so it
   never widens a difference);
2. round at random to a neighbour, up with the fractional part as probability: no bias. For one draw of the random
   numbers, two sums that differ by x differ after rounding by at most |x| + 1 in each coordinate, hence by at most
   S / grid + sqrt(D) as vectors. With 2^k >= 2^10 sqrt(D) that is (1 + 2^-10) S / grid: this margin is charged, in
   full and always, so no rounding has to be drawn again until it happens to be short ("conditional" rounding);
3. add N(0, s^2) rounded to an integer, s^2 = sigma^2 (1 + 2^-10)^2 (S / grid)^2 / honest_shares, and reduce modulo 2^b.

**The law of the sum.** Write U for uniform on [-1/2, 1/2]. A normal variable rounded to integers has the density of
N(0, s^2) + U at each integer. So the sum of n of them has, up to the aliasing below, the density of
N(0, n s^2) + U_1 + ... + U_n at each integer: it *is* round(N(0, n s^2) + U_2 + ... + U_n). Added to an integer x this
is round(x + N(0, n s^2) + U_2 + ... + U_n): the continuous Gaussian mechanism of standard deviation s sqrt(n), with
independent noise and rounding after it. Whatever accounting holds for that mechanism, privacy loss distributions,
Poisson sampling and composition included, holds for the sum; shares of further sites only add noise. The aliasing: by
Poisson's summation formula both laws have the characteristic function product of exp(-s^2 t^2 / 2) sinc(t / 2), but for
terms below exp(-pi^2 s^2 / 2); with s >= 8 they are below 1e-130, and the two laws differ by less than 1e-100 in total
variation over every coordinate of every round (`aliasing_bound`).

This is the distributed discrete Gaussian of Kairouz et al. (2021) with rounding in place of conditioning on integers:
chosen over Skellam noise (Agarwal et al. 2021) because its sum is dominated by the Gaussian mechanism exactly, where
Skellam has a Renyi bound alone, which neither the ledger's loss distributions nor Poisson sampling could use as it is.
Normals are drawn in float64: its own rounding is the caveat that local noise has too (`common.privacy.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ConfigError, DataError
from common.privacy.noise import NoiseSource
from common.secagg.assumptions import Assumptions

Words = NDArray[np.uint64]
Shapes = Mapping[str, tuple[int, ...]]

# What rounding may add to the sensitivity, relative to it; always charged in full.
ROUNDING_MARGIN = 2.0**-10
# The modulus leaves room for so many standard deviations of the noise beyond the largest sum.
_ROOM = 12.0
_LEAST_SHARE_STD = 8.0
_MOST_BITS = 48  # every integer, and its fractional part before rounding, is exact in float64


@dataclass(frozen=True)
class Quantisation:
    """Public arguments of one kind of release: what all sites and the server compute alike.

    Attributes:
        shapes: names and shapes of what is summed, in the order of their names in the vector.
        sensitivity: S, of a site's sum, to adding or removing one unit, in the joint Euclidean norm.
        grid: a power of two, what one integer step stands for.
        limit: largest magnitude of one site's coordinate, in steps.
        share_std: standard deviation of one site's noise, in steps.
        bits: b, sums are taken modulo 2^b; a multiple of 8.
        num_sites: m.
    """

    shapes: Shapes
    sensitivity: float
    grid: float
    limit: int
    share_std: float
    bits: int
    num_sites: int

    @property
    def size(self) -> int:
        """D, number of coordinates."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_bytes(self) -> int:
        """Size of a masked vector on the wire."""
        return self.size * self.bits // 8

    @property
    def wrap_probability(self) -> float:
        """Bound on the probability that any coordinate of one release's sum wraps around (below 1e-26 for 10^6)."""
        return self.size * math.erfc(_ROOM / math.sqrt(2.0))

    @property
    def aliasing_bound(self) -> float:
        """Bound on the total variation, over the whole vector, between the sum's law and the one accounted for.

        Each coordinate's two probability functions differ by less than 4 m exp(-pi^2 s^2 / 2) at any integer, and 2^50
        integers hold all but 1e-120 of both laws.
        """
        each = 4.0 * self.num_sites * math.exp(-0.5 * (math.pi * self.share_std) ** 2)
        return self.size * (2.0**50 * each + 1e-120)


def make_quantisation(
    shapes: Shapes, sensitivity: float, units: float, noise_multiplier: float, assumptions: Assumptions
) -> Quantisation:
    """Grid, limit, modulus and noise of a release, from public numbers alone.

    Args:
        shapes: name -> shape of what is summed.
        sensitivity: S > 0 of one site's sum, for adding or removing one unit.
        units: a public guess, above 0, of how many units' contributions point one way at most at one site. Too low a
            guess costs accuracy, never privacy: what is larger is cut.
        noise_multiplier: sigma of the whole sum, over S; positive.
        assumptions: sites, dropouts and colluders.

    Returns:
        The arguments. The sum of all sites is a Gaussian release with multiplier sigma against the server, outsiders
        and the colluders, for adding or removing one unit.

    Raises:
        ConfigError: a number that is not positive and finite, nothing to sum, or a modulus beyond 2^48.
    """
    for name, value in (("sensitivity", sensitivity), ("units", units), ("noise multiplier", noise_multiplier)):
        if not 0.0 < value < math.inf:
            raise ConfigError(f"secure aggregation: {name} must be positive and finite, found {value}")
    size = sum(math.prod(shape) for shape in shapes.values())
    if size == 0:
        raise ConfigError("secure aggregation: nothing to sum")
    fine = math.ceil(math.log2(math.sqrt(size) / ROUNDING_MARGIN))
    grid = math.ldexp(1.0, math.floor(math.log2(sensitivity)) - fine)
    steps = sensitivity / grid  # exact: a power of two; in [2^fine, 2^(fine + 1))
    share_std = noise_multiplier * (1.0 + ROUNDING_MARGIN) * steps * assumptions.share
    if share_std < _LEAST_SHARE_STD:
        raise ConfigError(f"secure aggregation: too little noise to share (multiplier {noise_multiplier:g})")
    limit = math.ceil(max(units, 1.0) * steps)
    sites = assumptions.num_sites
    largest = sites * (limit + 1.0) + _ROOM * math.sqrt(sites) * share_std + sites
    bits = 8 * math.ceil((math.log2(largest) + 1.0) / 8.0)
    if bits > _MOST_BITS:
        raise ConfigError(
            f"secure aggregation: sums up to {units:g} units and noise of multiplier {noise_multiplier:g} would need "
            f"{bits} bits, more than {_MOST_BITS}: use fewer parameters or less noise, or trust local"
        )
    ordered = {name: tuple(shapes[name]) for name in sorted(shapes)}
    return Quantisation(ordered, sensitivity, grid, limit, share_std, bits, sites)


def encode(arguments: Quantisation, tensors: Mapping[str, Tensor], source: NoiseSource) -> Words:
    """One site's sums as integers with its share of the noise, modulo 2^b, not yet masked.

    Args:
        arguments: of this release.
        tensors: the site's sums, by name, of the shapes in `arguments`; finite, as every clipped sum is. Not noised.
        source: secret randomness, for the rounding and the noise.

    Returns:
        (D,) uint64 below 2^b. By itself it is a Gaussian release with the share of the noise alone; it must leave the
        site masked.

    Raises:
        DataError: other names or shapes, or a value that is not finite; no value is quoted.
    """
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != dict(arguments.shapes):
        raise DataError("sums to be aggregated have other names or shapes than agreed; nothing was released")
    parts = [tensors[name].detach().to(device="cpu", dtype=torch.float64).numpy().ravel() for name in arguments.shapes]
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        raise DataError("sums to be aggregated: expected finite numbers; nothing was released")
    with np.errstate(over="ignore"):  # held within the limit like all that is too large
        values = np.clip(values / arguments.grid, -arguments.limit, arguments.limit)
    lower = np.floor(values)
    rounded = lower + (source.uniform(values.size) < values - lower)
    rounded += rounded_gaussian(source, values.size, arguments.share_std)
    return reduce_bits(rounded.astype(np.int64).view(np.uint64), arguments.bits)


def rounded_gaussian(source: NoiseSource, size: int, std: float) -> NDArray[np.float64]:
    """`size` independent N(0, std^2), each rounded to an integer (as float64): one site's share of the noise."""
    noise = source.gaussian(size, std)
    return np.rint(noise, out=noise)


def add_up(vectors: list[Words], bits: int) -> Words:
    """Sum of vectors modulo 2^b."""
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return reduce_bits(total, bits)


def decode(arguments: Quantisation, total: Words, scale: float = 1.0) -> dict[str, Tensor]:
    """The sum of all sites as float32 tensors, divided by `scale`; post-processing.

    Args:
        arguments: of the release.
        total: (D,) uint64, the sum modulo 2^b.
        scale: what to divide by, such as the number of sites.
    """
    shift = np.uint64(64 - arguments.bits)
    signed = (total << shift).view(np.int64) >> np.int64(shift)
    values = torch.from_numpy(signed.astype(np.float64) * (arguments.grid / scale)).float()
    tensors, start = {}, 0
    for name, shape in arguments.shapes.items():
        size = math.prod(shape)
        tensors[name] = values[start : start + size].reshape(shape)
        start += size
    return tensors


def reduce_bits(values: Words, bits: int) -> Words:
    """Values modulo 2^b; uint64 arithmetic itself is modulo 2^64."""
    return values & np.uint64((1 << bits) - 1)


def pack(values: Words, bits: int) -> bytes:
    """(D,) uint64 below 2^b as b/8 bytes each, little-endian."""
    return values.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()


def unpack(content: bytes, bits: int) -> Words:
    """The inverse of `pack`; any bytes are values below 2^b.

    Raises:
        DataError: the length is no multiple of b/8.
    """
    width = bits // 8
    if len(content) % width:
        raise DataError(f"a masked vector has a multiple of {width} bytes, found {len(content)}")
    wide = np.zeros((len(content) // width, 8), dtype=np.uint8)
    wide[:, :width] = np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
    return wide.reshape(-1).view("<u8").astype(np.uint64)
