"""No unit adds more than C to a sum, whatever float32 can hold: subnormal, huge, infinite, NaN; also flushed to zero.

Numbers are drawn as bit patterns, so every exponent is as likely as another. What a processor that flushes subnormal
numbers to zero would do is tried on this one, with `torch.set_flush_denormal`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.bounds import LEAST_CLIP_NORM
from common.kernels import fourier_frequencies
from common.privacy.clipping import clipped_gradient_sum, clipped_vector_sum
from common.privacy.factors import GradientFactors
from common.privacy.mechanism import add_gaussian
from common.privacy.noise import SecureNoise, TestNoise
from common.privacy.sampling import draw_units
from common.privacy.statistics import StatisticsSpec, statistics_sum
from common.records import SiteData, UnitBatch, clip_to_ball, on_sphere
from common.secagg.assumptions import Assumptions
from common.secagg.quantise import encode, make_quantisation
from tests.common.privacy.clipping_cases import summing
from tests.statistical.step_cases import (
    CLASSES,
    DIM,
    RECORDS,
    STEPS,
    UNITS,
    make_data,
    make_step,
    moved_by,
    step_sum,
    without,
)

clip_norms = st.sampled_from([LEAST_CLIP_NORM, 1.7e-6, 1e-4, 0.03, 10.0])


@contextmanager
def processor(flushes: bool) -> Iterator[None]:
    """Compute as a processor does that flushes subnormal numbers to zero, or as one that does not."""
    if flushes and not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush subnormal numbers to zero")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def any_floats(shape: tuple[int, ...], kind: str, generator: np.random.Generator) -> Tensor:
    """float32 numbers of a kind; `bits` are patterns of 32 bits as they come, NaN among them."""
    size = math.prod(shape)
    if kind == "bits":
        values = generator.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    elif kind == "subnormal":
        values = generator.integers(0, 2**23, size, dtype=np.uint32).view(np.float32)
    elif kind == "one exponent":  # rows alike in size, of any size
        values = (generator.integers(0, 2**23, size, dtype=np.uint32) + (generator.integers(1, 255) << 23)).astype(
            np.uint32
        ).view(np.float32) * generator.choice([-1.0, 1.0], size).astype(np.float32)
    elif kind == "alike":  # sums of squares err most where all numbers are one
        values = np.full(size, generator.integers(2**23, 255 << 23, dtype=np.uint32)).view(np.float32)
    else:
        values = np.full(size, {"zero": 0.0, "inf": math.inf, "nan": math.nan, "max": 3.4028235e38}[kind], np.float32)
    return torch.from_numpy(values.copy()).reshape(shape)


KINDS = ("bits", "subnormal", "one exponent", "one exponent", "alike", "alike", "zero", "inf", "nan", "max")
kinds = st.sampled_from(KINDS)


@pytest.mark.parametrize("where", ["processor", "gpu"])
@pytest.mark.parametrize("flushes", [False, True], ids=["", "flushed"])
@given(
    seed=st.integers(0, 2**32 - 1),
    sides=st.lists(kinds, min_size=6, max_size=6),
    rows=st.integers(1, 3),
    widths=st.tuples(st.sampled_from([1, 7, 64, 300]), st.sampled_from([1, 5, 64])),
    cancel=st.sampled_from([0.0, 0.0, 1.0, 1 + 1e-6, 1 + 1e-4]),
    clip_norm=clip_norms,
)
@settings(max_examples=300)
def test_no_unit_adds_more_than_the_clip_norm(where, flushes, seed, sides, rows, widths, cancel, clip_norm) -> None:
    """Exactly at most C: the clip factor pays for its own rounding, and nothing is left to a tolerance."""
    generator = np.random.default_rng(seed)
    wide, narrow = widths
    left, right = (any_floats((1, rows, size), kind, generator) for size, kind in zip(widths, sides, strict=False))
    if cancel and rows > 1:  # a patient's records that nearly cancel
        left[:, 1], right[:, 1] = -left[:, 0] * cancel, right[:, 0]
    with processor(flushes), summing(where):
        factors = GradientFactors()
        factors.add_outer("w", left, right)
        if rows == 1:
            factors.add_outer("w", any_floats((1, 1, wide), sides[2], generator), right * cancel)
        factors.add_vector("b", any_floats((1, wide), sides[3], generator))
        factors.add_shared("s", any_floats((1, wide), sides[4], generator), any_floats((narrow,), sides[5], generator))
        shapes = {"w": widths, "b": (wide,), "s": widths}
        summed = clipped_gradient_sum(factors, shapes, clip_norm)
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in summed.tensors.values()))
    assert norm <= summed.sensitivity == clip_norm


@pytest.mark.parametrize("where", ["processor", "gpu"])
@pytest.mark.parametrize("flushes", [False, True], ids=["", "flushed"])
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-12, 3), width=st.sampled_from([1, 30, 768, 8192]))
@settings(max_examples=200)
def test_a_clip_factor_pays_for_the_rounding_of_the_norm(where, flushes, seed, power, width) -> None:
    """Gradients just above C, where the whole of the margin counts, in vectors as wide as any layer."""
    generator = np.random.default_rng(seed)
    clip_norm = max(10.0**power, LEAST_CLIP_NORM)
    vector = any_floats((1, width), "alike" if seed % 2 else "one exponent", generator).double()
    vector = (vector * (clip_norm * (1 + 1e-7 * (seed % 100)) / vector.norm())).float()
    with processor(flushes), summing(where):
        summed = clipped_gradient_sum(GradientFactors(vectors={"b": [vector]}), {"b": (width,)}, clip_norm)
    assert float(summed.tensors["b"].double().norm()) <= clip_norm
    assert float(summed.tensors["b"].double().norm()) >= clip_norm * (1 - 1e-5 - 2 * width * 2.0**-24)


@given(seed=st.integers(0, 2**32 - 1), rows=st.lists(kinds, min_size=3, max_size=3), clip_norm=clip_norms)
@settings(max_examples=200)
def test_no_vector_adds_more_than_the_clip_norm(seed, rows, clip_norm) -> None:
    generator = np.random.default_rng(seed)
    vectors = torch.cat([any_floats((1, 40), kind, generator) for kind in rows])
    sums = [clipped_vector_sum(vectors[:count], clip_norm).tensors["sum"] for count in (0, 1, 2, 3)]
    for fewer, more in itertools.pairwise(sums):
        assert float((more - fewer).norm()) <= clip_norm * (1 + 1e-12)
    for row in vectors:  # alone there is no sum to round
        assert math.hypot(*clipped_vector_sum(row[None], clip_norm).tensors["sum"].tolist()) <= clip_norm
    wider = vectors.double() * 2.0**800  # beyond float32, and squares beyond float64
    assert float(clipped_vector_sum(wider[:1], clip_norm).tensors["sum"].norm()) <= clip_norm


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("where", ["processor", "gpu"])
@pytest.mark.parametrize("flushes", [False, True], ids=["", "flushed"])
@given(
    seed=st.integers(0, 2**32 - 1),
    records=st.lists(st.one_of(st.none(), kinds), min_size=UNITS, max_size=UNITS),
    parameters=st.one_of(st.none(), kinds),
    removed=st.integers(0, UNITS - 1),
    clip_norm=clip_norms,
)
@settings(max_examples=10)
def test_a_step_moves_by_at_most_the_clip_norm(
    name, where, flushes, seed, records, parameters, removed, clip_norm
) -> None:
    """Records of every kind, and parameters as no server should send them: one that is checked by nobody before."""
    generator = np.random.default_rng(seed)
    step = make_step(name, clip_norm)
    data = make_data(step, seed)
    for unit, kind in enumerate(records):
        if kind is not None:
            rows = data.groups == unit
            data.embeddings[rows] = any_floats((int(rows.sum()), DIM), kind, generator)
    if parameters is not None:
        chosen = sorted(step.params)[seed % len(step.params)]
        crafted = any_floats(tuple(step.params[chosen].shape), parameters, generator)
        step = replace(step, params={**step.params, chosen: crafted})
    with processor(flushes), summing(where):
        whole, rest = step_sum(step, data), step_sum(step, without(data, removed))
        assert moved_by(whole, rest) <= step.sensitivity * (1 + 1e-5)
        check_releasable(whole, step.sensitivity)


def check_releasable(sums: dict[str, Tensor], sensitivity: float) -> None:
    """What refuses a sum, behind the clipping, has nothing to refuse: each kind of noise takes it."""
    add_gaussian(sums, 0.5 * sensitivity, TestNoise(0))
    shapes = {name: tuple(value.shape) for name, value in sums.items()}
    encode(make_quantisation(shapes, sensitivity, UNITS, 0.5, Assumptions(4, 1, 1)), sums, TestNoise(0))
    TestNoise(0).exact_gaussian(np.array([float(value.double().sum()) for value in sums.values()]), 0.5 * sensitivity)


@pytest.mark.parametrize("flushes", [False, True], ids=["", "flushed"])
@given(
    seed=st.integers(0, 2**32 - 1),
    records=st.lists(st.one_of(st.none(), kinds), min_size=UNITS, max_size=UNITS),
    parts=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 4),
    radius=st.sampled_from([0.5, 1.0, 30.0]),
    patients=st.booleans(),
    sphere=st.booleans(),
    removed=st.integers(0, UNITS - 1),
)
@settings(max_examples=150)
def test_statistics_move_by_at_most_their_sensitivity(
    flushes, seed, records, parts, radius, patients, sphere, removed
) -> None:
    generator = np.random.default_rng(seed)
    data = make_data(make_step("dp_fedsgd patients" if patients else "dp_fedsgd"), seed)
    for unit, kind in enumerate(records):
        if kind is not None:
            rows = data.groups == unit
            data.embeddings[rows] = any_floats((int(rows.sum()), DIM), kind, generator)
    spec = StatisticsSpec(DIM, CLASSES, radius, 0.6, *parts, frequencies=fourier_frequencies(DIM, 8, [1.0], 0))

    def summed(data: SiteData) -> dict[str, Tensor]:
        rows = on_sphere(data.embeddings) if sphere else data.embeddings
        batch = draw_units(replace(data, embeddings=rows), 1.0, RECORDS, SecureNoise())
        return dict(statistics_sum(spec, batch).tensors)

    with processor(flushes):
        whole = summed(data)
        assert moved_by(whole, summed(without(data, removed))) <= spec.sensitivity * (1 + 1e-12)
    check_releasable(whole, spec.sensitivity)


def test_a_clipped_unit_of_statistics_pays_for_its_rounding_to_the_last_digit() -> None:
    """In exact numbers: a patient that is clipped adds no more than the sensitivity, not even by one rounding."""
    spec = StatisticsSpec(DIM, CLASSES, 0.7, 0.6, 1.0, 1.0, 0.0, 0.3, fourier_frequencies(DIM, 8, [1.0], 0))
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        row = torch.randn(1, 1, DIM, generator=generator).expand(1, RECORDS, DIM)
        batch = UnitBatch(row, torch.zeros(1, RECORDS, dtype=torch.long), torch.ones(1, RECORDS))
        sums = statistics_sum(spec, batch).tensors.values()
        squared = sum(Fraction(number) ** 2 for value in sums for number in value.flatten().tolist())
        assert Fraction(spec.sensitivity) ** 2 * (1 - Fraction(1, 10**11)) < squared <= Fraction(spec.sensitivity) ** 2


@pytest.mark.parametrize("flushes", [False, True], ids=["", "flushed"])
@given(seed=st.integers(0, 2**32 - 1), kind=kinds, radius=st.sampled_from([1e-3, 0.7, 30.0]))
@settings(max_examples=300)
def test_records_come_within_their_radius_or_are_not_finite(flushes, seed, kind, radius) -> None:
    rows = any_floats((4, 50), kind, np.random.default_rng(seed))
    with processor(flushes):
        for found, bound in ((on_sphere(rows), 1.0), (clip_to_ball(rows, radius), radius)):
            norms = found.double().norm(dim=-1)
            assert bool((norms <= bound * (1 + 1e-5))[torch.isfinite(rows).all(-1)].all())
