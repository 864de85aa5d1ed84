"""Adding or removing one unit moves a release by at most its declared sensitivity; broken versions do not.

`check_sensitivity` is the gate: it takes a way of summing and two neighbouring sets of units, with huge, tiny, NaN and
infinite rows among them. Units keep their own random numbers, as they do in the mechanism, where these are secret.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.generator.cvae import sample_given_labels
from common.generator.hypernetwork import generate
from common.generator.layers import PlainLayers
from common.generator.objective import record_losses
from common.generator.tape import Tape
from common.kernels import fourier_frequencies
from common.privacy.clipping import ClippedSum, clipped_gradient_sum, clipped_vector_sum
from common.privacy.factors import GradientFactors
from common.privacy.noise import TestNoise
from common.privacy.sampling import draw_units
from common.privacy.statistics import StatisticsSpec, statistics_sum
from common.records import SiteData, UnitBatch
from tests.common.privacy.clipping_cases import CASES, Case, flat, make_case, product_sum, record_factors
from tests.kernel_cases import mmd2

UNITS = 6
Release = Callable[[Case, list[int], float], ClippedSum]


class SensitivityError(Exception):
    """A unit moves the release by more than was accounted for."""


def check_sensitivity(release: Release, case: Case, removed: int, clip_norm: float) -> None:
    """Refuse a sum that one unit moves by more than its sensitivity, or that is not finite."""
    whole = release(case, list(range(UNITS)), clip_norm)
    without = release(case, [unit for unit in range(UNITS) if unit != removed], clip_norm)
    if whole.sensitivity != without.sensitivity:
        raise SensitivityError("the declared sensitivity, and so the noise, depends on the data")
    gap = flat(whole.tensors) - flat(without.tensors)
    if not bool(torch.isfinite(gap).all()):
        raise SensitivityError("the sum is not finite")
    if float(gap.norm()) > whole.sensitivity * (1 + 1e-5):
        raise SensitivityError(f"moved by {float(gap.norm()):.6g} of {whole.sensitivity:.6g}")


def scaled(case: Case, exponents: list[float]) -> Case:
    """The case with unit u's embeddings times 10^exponent; NaN and inf stand for rows full of them."""
    rows = [
        case.embeddings[unit] * 10.0**power if math.isfinite(power) else torch.full_like(case.embeddings[unit], power)
        for unit, power in enumerate(exponents)
    ]
    return replace(case, embeddings=torch.stack(rows))


powers = st.one_of(st.floats(-30, 30), st.sampled_from([math.nan, math.inf, 0.0, 0.0, 2.0]))


@given(
    name=st.sampled_from(sorted(CASES)),
    seed=st.integers(0, 50),
    exponents=st.lists(powers, min_size=UNITS, max_size=UNITS),
    removed=st.integers(0, UNITS - 1),
    clip_norm=st.sampled_from([1e-4, 0.03, 1.5, 50.0]),
)
@settings(max_examples=100)
def test_clipped_sums_move_by_at_most_the_clip_norm(name, seed, exponents, removed, clip_norm) -> None:
    case = scaled(make_case(units=UNITS, seed=seed, **CASES[name]), exponents)
    check_sensitivity(product_sum, case, removed, clip_norm)


@given(
    powers=st.lists(st.tuples(st.floats(-37, 37), st.floats(-37, 37)), min_size=UNITS, max_size=UNITS),
    rows=st.integers(1, 3),
    cancel=st.booleans(),
    removed=st.integers(0, UNITS - 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200)
def test_clipped_sums_of_any_factors_move_by_at_most_the_clip_norm(powers, rows, cancel, removed, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(UNITS, rows, 7, generator=generator),
        torch.randn(UNITS, rows, 5, generator=generator),
    )
    if cancel and rows > 1:  # a patient's records nearly cancel: the Gram norm is a small difference of large numbers
        left[:, 1], right[:, 1] = -left[:, 0] * (1 + 1e-6), right[:, 0]
    exponents = torch.tensor(powers)
    left, right = left * 10.0 ** exponents[:, 0, None, None], right * 10.0 ** exponents[:, 1, None, None]
    vector = torch.randn(UNITS, 4, generator=generator) * 10.0 ** exponents[:, :1]

    def release(_: Case, units: list[int], clip_norm: float) -> ClippedSum:
        factors = GradientFactors({"w": [(left[units], right[units])]}, {"b": [vector[units]]})
        return clipped_gradient_sum(factors, {"w": (7, 5), "b": (4,)}, clip_norm)

    check_sensitivity(release, None, removed, 0.5)


@given(
    exponents=st.lists(powers, min_size=UNITS, max_size=UNITS),
    removed=st.integers(0, UNITS - 1),
    rows=st.integers(1, 3),
    parts=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 5),
    radius=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_statistics_move_by_at_most_their_sensitivity(exponents, removed, rows, parts, radius, seed) -> None:
    case = scaled(make_case(units=UNITS, rows=rows, seed=seed), exponents)
    spec = StatisticsSpec(
        6, 3, radius, *(max(parts[0], 0.1), *parts[1:]), frequencies=fourier_frequencies(6, 8, [1.0], 0)
    )

    def release(case: Case, units: list[int], _: float) -> ClippedSum:
        return statistics_sum(spec, UnitBatch(case.embeddings[units], case.labels[units], case.mask[units]))

    check_sensitivity(release, case, removed, 1.0)


def test_the_sensitivity_is_reached() -> None:
    """A declared sensitivity that nothing reaches would waste budget: a large record moves the sum by all of C."""
    for name in CASES:
        case = scaled(make_case(units=UNITS, **CASES[name]), [1.0] * UNITS)
        whole = flat(product_sum(case, list(range(UNITS)), 1e-4).tensors)
        without = flat(product_sum(case, list(range(1, UNITS)), 1e-4).tensors)
        # a patient's norm carries a safety margin, and numbers of this size have few digits left
        assert float((whole - without).norm()) > 0.99e-4, name
    spec = StatisticsSpec(6, 3, 1.0, moment_weight=1.0)
    one = UnitBatch(torch.ones(1, 1, 6), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    assert float(flat(statistics_sum(spec, one).tensors).norm()) == pytest.approx(spec.sensitivity, rel=1e-6)


# --- broken versions: the gate must refuse each -------------------------------------------------------------------


def _no_clipping(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    return ClippedSum(product_sum(case, units, math.inf).tensors, clip_norm)


def _mean_over_the_batch(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    """The mean of Eq. 9 with noise scaled to it: both depend on how many units were sampled."""
    summed = product_sum(case, units, clip_norm)
    return ClippedSum({n: v / len(units) for n, v in summed.tensors.items()}, clip_norm / len(units))


def _each_tensor_by_itself(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    total = {name: torch.zeros(shape) for name, shape in case.shapes.items()}
    for unit in units:
        for name, value in product_sum(case, [unit], math.inf).tensors.items():
            total[name] += value * min(1.0, clip_norm / max(float(value.norm()), 1e-12))
    return ClippedSum(total, clip_norm)


def _sum_clipped_after_adding(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    total = product_sum(case, units, math.inf).tensors
    norm = float(flat(total).norm())
    return ClippedSum({n: v * min(1.0, clip_norm / norm) for n, v in total.items()}, clip_norm)


def _nan_is_kept(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    vectors = torch.stack([flat(product_sum(case, [unit], math.inf).tensors) for unit in units])
    poisoned = torch.where(torch.isfinite(case.embeddings[units]).all(-1), vectors, math.nan)
    return ClippedSum({"sum": poisoned.sum(0)}, clip_norm)


def _code_left_unclipped(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    raw = product_sum(case, units, math.inf).tensors["code"]
    return ClippedSum({**product_sum(case, units, clip_norm).tensors, "code": raw}, clip_norm)


def _mmd_left_unclipped(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    """Eqs. 6 and 9 as printed: the gradient of a batch's MMD^2 goes up beside the clipped part."""
    clipped = product_sum(case, units, clip_norm).tensors
    leaves = {name: value.clone().requires_grad_() for name, value in case.params.items()}
    hot = torch.eye(3).repeat(20, 1)
    generator = torch.Generator().manual_seed(0)
    _, drawn = sample_given_labels(case.shape, generate(case.shape, leaves, case.code), hot, generator)
    mmd2(case.embeddings[units, 0], drawn, [0.5, 1.0, 2.0]).backward()
    extra = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return ClippedSum({n: v + extra[n] if n in extra else v for n, v in clipped.items()}, clip_norm)


def _numbers_by_place(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    """Latent noise from a public seed, by place in the batch: whoever follows a removed unit gets other numbers."""
    tape = Tape(case.params, case.code, len(units))
    rows = torch.tensor(units)
    batch = case.embeddings[rows], case.labels[rows], case.mask[rows]
    losses = record_losses(case.shape, case.training, tape, PlainLayers(case.encoder), *batch, TestNoise(0))
    return clipped_gradient_sum(tape.factors(losses), case.shapes, clip_norm)


def _encoder_trained_on_records(case: Case, units: list[int], clip_norm: float) -> ClippedSum:
    """Eq. 8 as printed: the encoder moves along the unclipped gradient first, then everything else is clipped."""
    raw = product_sum(replace(case, joint=True), units, math.inf).tensors
    encoder = {name: value - 0.1 * raw[name] for name, value in case.encoder.items()}
    return product_sum(replace(case, encoder=encoder), units, clip_norm)


BROKEN = {
    "no clipping": _no_clipping,
    "mean over the sampled batch": _mean_over_the_batch,
    "each tensor clipped by itself": _each_tensor_by_itself,
    "sum clipped after adding": _sum_clipped_after_adding,
    "NaN kept": _nan_is_kept,
    "code left unclipped": _code_left_unclipped,
    "MMD left unclipped": _mmd_left_unclipped,
    "random numbers by place": _numbers_by_place,
    "encoder trained on records": _encoder_trained_on_records,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sums_are_refused(name: str) -> None:
    caught = 0
    for seed in range(6):
        power = {
            "NaN kept": math.nan,
            "sum clipped after adding": 3.0,
            "encoder trained on records": 1.5,
        }.get(name, 0.5)
        case = scaled(make_case(units=UNITS, seed=seed), [power] + [0.0] * (UNITS - 1))
        try:
            check_sensitivity(BROKEN[name], case, 0, 0.05)
        except SensitivityError:
            caught += 1
    assert caught >= 5, f"{name}: {caught} of 6"


def test_records_clipped_one_by_one_do_not_protect_a_patient() -> None:
    case = make_case(units=UNITS, rows=3)
    split = replace(
        case,
        embeddings=case.embeddings.reshape(-1, 1, 6),
        labels=case.labels.reshape(-1, 1),
        mask=case.mask.reshape(-1, 1),
    )

    def by_record(_: Case, units: list[int], clip_norm: float) -> ClippedSum:
        records = [3 * unit + row for unit in units for row in range(3) if case.mask[unit, row] > 0]
        return product_sum(split, records, clip_norm)

    with pytest.raises(SensitivityError):
        check_sensitivity(by_record, case, 0, 1e-3)


# --- normaliser: the law of a release does not tell n from n - 1 ----------------------------------------------------


def test_scale_of_a_release_does_not_depend_on_how_many_units_there_are() -> None:
    """With n of 1 to 3 and one unit less, a fixed unit's part of the sum is the same: nothing is divided by a count."""
    case = make_case(units=4)
    alone = flat(product_sum(case, [0], 0.01).tensors)
    for others in ([1], [1, 2], [1, 2, 3]):
        rest = flat(product_sum(case, others, 0.01).tensors)
        together = flat(product_sum(case, [0, *others], 0.01).tensors)
        assert torch.allclose(together - rest, alone, atol=1e-7)
    # the broken version, a mean over the batch, is not additive
    mean = flat(_mean_over_the_batch(case, [0, 1, 2], 0.01).tensors)
    rest = flat(_mean_over_the_batch(case, [1, 2], 0.01).tensors)
    assert not torch.allclose(mean - rest, alone, atol=1e-7)


# --- sampler ----------------------------------------------------------------------------------------------------------


def inclusion_pvalue(draw: Callable[[], list[int]], count: int, rate: float, draws: int) -> float:
    """Smallest p-value of three laws of Poisson sampling: each unit's count, the batch size, and pairs."""
    from scipy import stats

    seen = np.zeros((draws, count))
    for row in range(draws):
        seen[row, draw()] = 1.0
    each = ((seen.sum(0) - draws * rate) ** 2 / (draws * rate * (1 - rate))).sum()
    sizes = np.bincount(seen.sum(1).astype(int), minlength=count + 1)
    law = stats.binom.pmf(np.arange(count + 1), count, rate) * draws
    keep = law >= 10  # the rest in one cell
    observed, expected = np.append(sizes[keep], sizes[~keep].sum()), np.append(law[keep], law[~keep].sum())
    spread = ((observed - expected) ** 2 / expected).sum()
    halves = [(part.sum(1) - count // 2 * rate) for part in (seen[:, : count // 2], seen[:, count // 2 :])]
    together = (halves[0] * halves[1]).sum() / (count // 2 * rate * (1 - rate) * math.sqrt(draws))
    pair = 2 * stats.norm.sf(abs(together))
    return float(min(stats.chi2.sf(each, count), stats.chi2.sf(spread, keep.sum()), pair))


def _drawer(groups: Tensor | None, count: int, rate: float, seed: int) -> Callable[[], list[int]]:
    """Units drawn, read back from the first coordinate of their records."""
    marks = (torch.arange(count) if groups is None else groups).float()
    data = SiteData(marks[:, None], torch.zeros(len(marks), dtype=torch.long), groups)
    source = TestNoise(seed)

    def draw() -> list[int]:
        batch = draw_units(data, rate, 2, source)
        return batch.embeddings[:, 0, 0].long().tolist()

    return draw


@pytest.mark.parametrize("patients", [False, True], ids=["records", "patients"])
def test_units_are_drawn_independently_at_the_public_rate(patients: bool) -> None:
    groups = torch.arange(40).repeat_interleave(3) if patients else None
    assert inclusion_pvalue(_drawer(groups, 40, 0.15, 3), 40, 0.15, 4000) > 1e-6


def test_samplers_that_are_not_poisson_are_refused() -> None:
    generator = np.random.default_rng(0)
    order: list[int] = []

    def shuffled() -> list[int]:
        """Epochs of a shuffled order, in batches of fixed size: what most training code does."""
        if len(order) < 6:
            order[:] = generator.permutation(40).tolist()
        return [order.pop() for _ in range(6)]

    fixed = generator.choice(40, 6, replace=False)
    broken = {
        "shuffled": shuffled,
        "fixed size": lambda: generator.choice(40, 6, replace=False).tolist(),
        "first round only": lambda: fixed.tolist(),
        "another rate": lambda: np.flatnonzero(generator.random(40) < 0.18).tolist(),
        "in pairs": lambda: [u for p in np.flatnonzero(generator.random(20) < 0.15) for u in (p, p + 20)],
    }
    for name, draw in broken.items():
        assert inclusion_pvalue(draw, 40, 0.15, 4000) < 1e-6, name


def test_clipped_vectors_move_by_at_most_the_clip_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    for power in (-30.0, 0.0, 30.0, math.nan, math.inf):
        rows = torch.randn(UNITS, 5, generator=generator)
        rows[0] = rows[0] * 10.0**power if math.isfinite(power) else power
        gap = clipped_vector_sum(rows, 0.3).tensors["sum"] - clipped_vector_sum(rows[1:], 0.3).tensors["sum"]
        assert float(gap.norm()) <= 0.3 * (1 + 1e-5)


def test_a_whole_unit_of_factors_is_kept_by_its_own_numbers() -> None:
    """The premise of the gate: with its own numbers, a unit's gradient does not depend on the others in the batch."""
    case = make_case(units=UNITS)
    whole, part = record_factors(case, list(range(UNITS))), record_factors(case, [2, 4])
    for name, pairs in part.outer.items():
        for (left, right), (all_left, all_right) in zip(pairs, whole.outer[name], strict=True):
            assert torch.allclose(left, all_left[[2, 4]], atol=1e-6)
            assert torch.allclose(right, all_right[[2, 4]], atol=1e-6)
