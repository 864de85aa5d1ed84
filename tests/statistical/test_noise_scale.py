"""The noise of a release has exactly the scale it was accounted for; every wrong scale or shape is caught.

`check_noise` is the gate. It takes a release of 10^6 zero coordinates and holds it against N(0, (σC)²). The
broken versions below are what it is for: each must fail it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from common.privacy.mechanism import add_gaussian
from common.privacy.noise import SecureNoise, TestNoise

NOISE_MULTIPLIER, CLIP_NORM = 2.1, 1.5
STD = NOISE_MULTIPLIER * CLIP_NORM
SHAPES = {"weight": (700, 1000), "shift": (299_990,), "code": (10,)}  # 10^6 coordinates in three tensors
Release = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class NoiseMismatchError(Exception):
    """The released noise is not the noise that was accounted for."""


def check_noise(release: Release) -> None:
    """Refuse a mechanism whose noise on a zero sum is not N(0, (σC)²), fresh for each coordinate and call."""
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    releases = [release(zero) for _ in range(2)]
    first, second = (np.concatenate([r[name].numpy().ravel() for name in SHAPES]) / STD for r in releases)
    count = first.size
    # The standard error of s² is 0.0014 at 10^6: the threshold lies at 5.3 of them.
    if not abs(np.mean(first**2) - 1.0) < 0.0075:
        raise NoiseMismatchError(f"scale: s²/(σC)² is {np.mean(first**2):.4f}")
    if not stats.kstest(first, "norm").pvalue > 1e-6:
        raise NoiseMismatchError("shape: Kolmogorov-Smirnov against the normal law")
    independent = {
        "calls": np.mean(first * second),
        "neighbours": np.mean(first[1:] * first[:-1]),
        "halves": np.mean(first[: count // 2] * first[count // 2 :]) / math.sqrt(2.0),
        "tensors": np.mean(first[:299_990] * first[700_000:999_990]) * math.sqrt(0.29999),
    }
    for name, correlation in independent.items():
        if not abs(correlation) < 6.0 / math.sqrt(count):
            raise NoiseMismatchError(f"independence of {name}: correlation {correlation:.4f}")


@pytest.mark.parametrize("source", [SecureNoise(), TestNoise(11)], ids=["secure", "test"])
def test_noise_scale_is_the_accounted_one(source) -> None:
    check_noise(lambda sums: add_gaussian(sums, STD, source))


def _same_noise_for_every_tensor(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    source = SecureNoise()
    longest = source.gaussian(1_000_000, STD)
    return {name: s + torch.from_numpy(longest[: s.numel()]).reshape(s.shape) for name, s in sums.items()}


def _laplace(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    return {n: s + torch.from_numpy(generator.laplace(0, STD / 2**0.5, s.shape)) for n, s in sums.items()}


def _bounded(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.clamp(-2.5 * STD, 2.5 * STD) for n, t in add_gaussian(sums, STD, SecureNoise()).items()}


def _coarse(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: (t / STD * 8).round() / 8 * STD for n, t in add_gaussian(sums, STD, SecureNoise()).items()}


def _scaled(factor: float) -> Release:
    return lambda sums: add_gaussian(sums, factor * STD, SecureNoise())


def _one_tensor_bare(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return add_gaussian(sums, STD, SecureNoise()) | {"shift": sums["shift"]}


BROKEN: dict[str, Release] = {
    "noise x 2/3": _scaled(2 / 3),
    "noise x 3/2": _scaled(3 / 2),
    "noise / 2": _scaled(1 / 2),
    "noise / 10": _scaled(1 / 10),
    "noise x 0.99": _scaled(0.99),
    "σ without C": _scaled(1 / CLIP_NORM),
    "variance for standard deviation": _scaled(STD),
    "divided by the sampled batch": lambda sums: {
        n: t / np.random.default_rng().binomial(1613, 0.08) for n, t in _scaled(1.0)(sums).items()
    },
    "one tensor without noise": _one_tensor_bare,
    "the same noise for every tensor": _same_noise_for_every_tensor,
    "the same seed in every round": lambda sums: add_gaussian(sums, STD, TestNoise(0)),
    "Laplace of the same variance": _laplace,
    "tails cut off": _bounded,
    "grid too coarse": _coarse,
}


@pytest.mark.parametrize("name", BROKEN)
def test_noise_scale_rejects_broken(name: str) -> None:
    with pytest.raises(NoiseMismatchError):
        check_noise(BROKEN[name])


def check_exact_sampler(release: Callable[[np.ndarray, float], np.ndarray]) -> None:
    """As `check_noise` for the one-shot statistics, with the draws its sampler makes in a second."""
    count = 20_000
    noise = (release(np.full(count, 7.25), STD) - 7.25) / STD
    if not abs(np.mean(noise**2) - 1.0) < 5.3 * math.sqrt(2.0 / count):
        raise NoiseMismatchError(f"scale: s²/(σC)² is {np.mean(noise**2):.4f}")
    if not stats.kstest(noise, "norm").pvalue > 1e-6:
        raise NoiseMismatchError("shape: Kolmogorov-Smirnov against the normal law")


def test_exact_sampler_has_the_accounted_scale() -> None:
    check_exact_sampler(SecureNoise().exact_gaussian)
    check_exact_sampler(TestNoise(1).exact_gaussian)


@pytest.mark.parametrize("factor", [0.5, 2 / 3, 0.9, 3 / 2])
def test_exact_sampler_rejects_broken_scales(factor: float) -> None:
    with pytest.raises(NoiseMismatchError):
        check_exact_sampler(lambda values, std: TestNoise(1).exact_gaussian(values, factor * std))
