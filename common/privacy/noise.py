"""Secure Gaussian noise: the only place that draws it.

Three places add it: `mechanism` to sums of gradients, `statistics` to the one-shot
statistics, and `secagg.quantise.encode` a site's share of it to the integers of a secure sum.

Where the noise comes from. AES-128 in counter mode, with key and first counter value (256 bits) from the
operating system for every source and again in every forked child. A source can't be copied or pickled, so no
stream is used twice. The numbers of a run's seed never reach it. `TestNoise` has a fixed seed, says so
(`certified` is False), and is for tests and audits with made-up records.

What leaves. Noise is drawn in float64, added to the float64 sum, and only then is the *noisy* value rounded
to a public grid, the power of two that `noise_grid` derives from the noise's standard deviation alone;
rounding after the noise is post-processing. This hides the low-order bits in which floating-point attacks
read the sum (Mironov 2012): it mitigates them, it does not exclude them. `exact_gaussian` for the one-shot
statistics has no such gap: OpenDP's discrete Gaussian over integers, drawn with exact arithmetic, at some
20,000 to 40,000 numbers a second.
"""

from __future__ import annotations

import math
import os
import secrets
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from randomgen import AESCounter

from common.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]

# The grid of a released value is 2^-20 to 2^-19 of the noise's standard deviation, below what noise hides
# anyway.
_GRID_BITS = 20
# The exact sampler's integers are this many bits finer, so that rounding before its noise costs next to
# nothing...
_EXACT_GRID_BITS = 40
# ...and this much more noise pays for it: sqrt(d) grid / sensitivity < 1e-6 while σ sqrt(d) < 10^6.
_EXACT_SCALE_MARGIN = 1.0 + 1e-6
_LARGEST_EXACT_INTEGER = 2.0**62
# Far outside any use; inside, every grid is a normal float64.
_SMALLEST_STD, _LARGEST_STD = 1e-100, 1e100


class NoiseSource(Protocol):
    """Where randomness that protects records comes from: a cryptographic stream, or a fixed seed in tests."""

    @property
    def name(self) -> str:
        """`secure` or `test`: what a privacy statement says."""
        ...

    @property
    def certified(self) -> bool:
        """Whether a release made with this source may be called private."""
        ...

    def gaussian(self, shape: int | tuple[int, ...], std: float) -> FloatArray:
        """Independent N(0, std²) float64 values, *not* yet on the grid: add them with `mechanism.add_gaussian`."""
        ...

    def uniform(self, size: int) -> FloatArray:
        """Independent uniform float64 values in [0, 1), for Poisson sampling and random subsets."""
        ...

    def exact_gaussian(self, values: FloatArray, std: float) -> FloatArray:
        """The values plus discrete Gaussian noise of this standard deviation, on the grid `std` / 2^40."""
        ...


_forks_seen = 0


def _count_fork() -> None:
    global _forks_seen
    _forks_seen += 1


os.register_at_fork(after_in_child=_count_fork)


def this_process() -> tuple[int, int]:
    """What tells a process from those it forks and those that had its number before."""
    return os.getpid(), _forks_seen


class SecureNoise:
    """AES-128 counter stream with 256 bits of operating-system entropy; a fork gets a stream of its own."""

    name = "secure"
    certified = True

    def __init__(self) -> None:
        self._reseed()

    def _reseed(self) -> None:
        # Entropy goes in as key and counter themselves: the seed argument would pass it through a 32-bit
        # hash.
        bits = AESCounter(key=secrets.randbits(128), counter=secrets.randbits(128))
        self._generator = np.random.Generator(bits)
        self._owner = this_process()

    def _own_generator(self) -> np.random.Generator:
        if self._owner != this_process():
            self._reseed()
        return self._generator

    def gaussian(self, shape: int | tuple[int, ...], std: float) -> FloatArray:
        """See `NoiseSource.gaussian`; ConfigError for a standard deviation that is not finite and >= 0."""
        return _scaled_normals(self._own_generator(), shape, std)

    def uniform(self, size: int) -> FloatArray:
        """See `NoiseSource.uniform`."""
        return self._own_generator().random(size)

    def exact_gaussian(self, values: FloatArray, std: float) -> FloatArray:
        """Add exact discrete Gaussian noise (OpenDP, which draws its own operating-system entropy).

        Args:
            values: float64 sums of any shape, finite.
            std: noise multiplier times L2 sensitivity of `values`, positive and finite.

        Returns:
            Noisy values of the same shape on the grid 2^(floor(log2 std) - 40). The scale is one part in a
            million above `std`, which pays for rounding the values before the noise. Values beyond 2^22 standard
            deviations are held there first: a projection never widens a difference.

        Raises:
            ConfigError: the standard deviation is not positive and finite.
            DataError: a value is not finite, which no clipped sum is.

        Source: Canonne, Kamath, Steinke 2020 (the sampler, and that its guarantee is the continuous
            Gaussian's).
        """
        integers, grid = _to_grid(values, std)
        import opendp.prelude as dp

        # OpenDP's word for constructors whose proofs are written but not yet vetted.
        dp.enable_features("contrib")
        space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
        measurement: Any = dp.m.make_gaussian(*space, std / grid * _EXACT_SCALE_MARGIN)
        drawn = measurement(integers.ravel().tolist()) if integers.size else []
        return _from_grid(np.array(drawn, dtype=np.float64).reshape(integers.shape), grid)

    def __reduce__(self) -> NoReturn:
        raise TypeError("SecureNoise can't be copied or pickled: its stream would be used twice; make a new one")


class TestNoise:
    """A fixed-seed source for tests and audits on made-up records: nothing made with it is private."""

    __test__ = False  # not a test class, whatever its name suggests to a collector
    name = "test"
    certified = False

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def gaussian(self, shape: int | tuple[int, ...], std: float) -> FloatArray:
        """See `NoiseSource.gaussian`."""
        return _scaled_normals(self._generator, shape, std)

    def uniform(self, size: int) -> FloatArray:
        """See `NoiseSource.uniform`."""
        return self._generator.random(size)

    def exact_gaussian(self, values: FloatArray, std: float) -> FloatArray:
        """As `SecureNoise.exact_gaussian`, with rounded float64 normals in place of the exact sampler."""
        integers, grid = _to_grid(values, std)
        scale = std / grid * _EXACT_SCALE_MARGIN
        noisy: FloatArray = self._generator.standard_normal(integers.shape)
        noisy *= scale
        return _from_grid(np.rint(noisy) + integers.astype(np.float64), grid)


def add_gaussian_array(values: FloatArray, std: float, source: NoiseSource) -> FloatArray:
    """As `mechanism.add_gaussian` for one float64 array: noise, then rounding to `noise_grid(std)`.

    Raises:
        ConfigError: the standard deviation is negative or not finite.
        DataError: a value is not finite.
    """
    check_std(std)
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("sum to be noised: expected finite numbers, found NaN or infinity; nothing was released")
    if std == 0.0:
        return values.copy()
    noisy = source.gaussian(values.shape, std)
    noisy += values
    return round_to_grid(noisy, noise_grid(std))


def noise_grid(std: float) -> float:
    """The public grid of a release: 2^(floor(log2 std) - 20), from the standard deviation alone.

    Raises:
        ConfigError: the standard deviation is not positive and finite.
    """
    check_std(std)
    if std == 0.0:
        raise ConfigError("standard deviation of the noise: expected a positive number, found 0")
    _, exponent = math.frexp(std)  # std = m 2^exponent with m in [1/2, 1)
    return math.ldexp(1.0, exponent - 1 - _GRID_BITS)


def round_to_grid(values: FloatArray, grid: float) -> FloatArray:
    """Round in place to multiples of a power of two (ties to even); exact in float64."""
    values *= 1.0 / grid  # exact: a power of two
    np.rint(values, out=values)
    values *= grid
    return values


def check_std(std: float) -> None:
    """Refuse a standard deviation that is not 0 or a finite positive number, or whose grid could not be."""
    number = isinstance(std, (int, float)) and not isinstance(std, bool)
    if not number or not (std == 0.0 or _SMALLEST_STD <= std <= _LARGEST_STD):
        raise ConfigError(
            f"standard deviation of the noise: expected 0 or a finite number from {_SMALLEST_STD:g} to "
            f"{_LARGEST_STD:g}, found {std!r}"
        )


def _scaled_normals(generator: np.random.Generator, shape: int | tuple[int, ...], std: float) -> FloatArray:
    check_std(std)
    noise: FloatArray = generator.standard_normal(shape)
    noise *= std
    return noise


def _to_grid(values: FloatArray, std: float) -> tuple[NDArray[np.int64], float]:
    """Values as integers on the exact sampler's grid, and that grid."""
    grid = noise_grid(std) * 2.0 ** (_GRID_BITS - _EXACT_GRID_BITS)
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("statistics to be noised: expected finite numbers; nothing was released")
    with np.errstate(over="ignore"):  # held within the bound like all that is too large
        scaled = np.clip(values / grid, -_LARGEST_EXACT_INTEGER, _LARGEST_EXACT_INTEGER)
    return np.rint(scaled).astype(np.int64), grid


def _from_grid(integers: FloatArray, grid: float) -> FloatArray:
    values: FloatArray = integers * grid
    return values
