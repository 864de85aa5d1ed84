"""A fault inside one unit, at any line of the step that reads records, touches no other unit and ends nothing.

The sweep runs a whole step again and again. Each time, one unit's numbers in the result of one more operation, forward
or backward, are replaced by what a fault could leave there; the sum must be the clean sum without that unit, up to C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.generator.layers import _ENOUGH_ROWS
from common.kernels import fourier_frequencies
from common.privacy import clipping, statistics
from common.privacy.noise import SecureNoise
from common.privacy.sampling import draw_units
from common.privacy.statistics import StatisticsSpec, release_statistics, statistics_sum
from common.records import SiteData, UnitBatch
from tests.common.privacy.clipping_cases import summing
from tests.statistical.step_cases import (
    CLASSES,
    DIM,
    RECORDS,
    STEPS,
    UNITS,
    Step,
    make_data,
    make_step,
    moved_by,
    step_sum,
    without,
)

POISONS = (math.nan, math.inf, -math.inf, 1e38, -3e38, 1e-42)
TARGET = 4  # a patient with two records


class Poison(TorchDispatchMode):
    """Replaces one unit's numbers in the result of operation number `at`; counts those where there are any."""

    def __init__(self, rows: dict[int, list[int]], at: int, value: float) -> None:
        super().__init__()
        self.rows, self.at, self.value = rows, at, value
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused or 0 <= self.at < self.count:
            return out
        for tensor in out if isinstance(out, tuple) else (out,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim == 0:
                continue
            rows = self.rows.get(tensor.shape[0])
            if rows is None or tensor.stride(0) == 0:
                continue  # nothing of single units, or one number that all share
            if self.count == self.at:
                numbers = tensor.data  # not a change that autograd should see
                for dim, stride in enumerate(tensor.stride()):
                    numbers = numbers if stride else numbers.narrow(dim, 0, 1)  # one number in several places
                numbers[rows] = self.value
            self.count += 1
        return out

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def rows_of(data: SiteData, records: int) -> dict[int, list[int]]:
    """Where the target's numbers lie in tensors over units, their records' places, the site's records, padded rows."""
    places = list(range(TARGET * records, (TARGET + 1) * records))
    found = torch.nonzero(data.groups == TARGET)[:, 0].tolist()
    return {len(data.groups): found, _ENOUGH_ROWS: [TARGET], UNITS * records: places, UNITS: [TARGET]}


def poisoned_sum(step: Step, data: SiteData, at: int, value: float) -> tuple[dict[str, Tensor], int]:
    """The step's sum with the fault, and how many places for one there are up to the clipping."""
    poison = Poison(rows_of(data, RECORDS if step.patients else 1), at, value)

    def untouched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with poison.pause():
                return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        # from here on there are factors, checked one by one: what they can be is the other test's matter
        patch.setattr(clipping, "_clipped_part", untouched(clipping._clipped_part))
        with poison:
            found = step_sum(step, data)
    return found, poison.count


@pytest.mark.parametrize("name", STEPS)
def test_a_fault_in_one_unit_at_any_operation_moves_the_sum_by_at_most_the_clip_norm(name: str) -> None:
    step = make_step(name)
    data = make_data(step)
    clean = step_sum(step, without(data, TARGET))
    _, places = poisoned_sum(step, data, -1, 0.0)
    assert places > 10
    for at in range(places):
        value = POISONS[at % len(POISONS)]
        found, _ = poisoned_sum(step, data, at, value)
        assert moved_by(found, clean) <= step.sensitivity * (1 + 1e-5), (at, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedhypevae", "fedhypevae patients", "dp_cvae"])
def test_every_fault_at_every_operation(name: str) -> None:
    step = make_step(name)
    data = make_data(step)
    clean = step_sum(step, without(data, TARGET))
    for at in range(poisoned_sum(step, data, -1, 0.0)[1]):
        for value in POISONS:
            found, _ = poisoned_sum(step, data, at, value)
            assert moved_by(found, clean) <= step.sensitivity * (1 + 1e-5), (at, value)


@pytest.mark.parametrize("value", [*POISONS, 3e38, 0.0, 1e20, 1e-20])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("where", ["processor", "gpu"])
def test_records_of_one_unit_may_hold_anything(where: str, name: str, value: float) -> None:
    """Whole rows and single numbers, in the first record too: padding of other patients must not read it."""
    step = make_step(name)
    data = make_data(step)
    for unit in (0, TARGET):
        clean = step_sum(step, without(data, unit))
        for columns in (slice(None), slice(3, 4)):
            rows = data.embeddings.clone()
            rows[torch.nonzero(data.groups == unit)[0], columns] = value
            with summing(where):
                found = step_sum(step, replace(data, embeddings=rows))
            assert moved_by(found, clean) <= step.sensitivity * (1 + 1e-5), (unit, columns)


@pytest.mark.parametrize("label", [-1, CLASSES, 2**40, -(2**63)])
@pytest.mark.parametrize("name", STEPS)
def test_a_label_of_no_class_is_no_exception(name: str, label: int) -> None:
    step = make_step(name)
    data = make_data(step)
    labels = data.labels.clone()
    labels[torch.nonzero(data.groups == TARGET)[:, 0]] = label
    found = step_sum(step, replace(data, labels=labels), left_out=(TARGET,))
    assert moved_by(found, step_sum(step, without(data, TARGET))) <= 1e-6 * step.sensitivity


# --- statistics -------------------------------------------------------------------------------------------------------

SPEC = StatisticsSpec(
    DIM, CLASSES, 1.0, moment_weight=0.5, feature_weight=0.5, frequencies=fourier_frequencies(DIM, 8, [1.0], 0)
)


def batch_of(data: SiteData) -> UnitBatch:
    return draw_units(data, 1.0, RECORDS, SecureNoise())


@pytest.mark.parametrize("function", ["clip_to_ball", "fourier_features", "_unit_norms"])
@pytest.mark.parametrize("value", POISONS)
def test_a_fault_in_one_unit_moves_the_statistics_by_at_most_their_sensitivity(
    function: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if function == "_unit_norms" and value < 1:
        return  # a norm that comes out too small is no fault of a record
    data = make_data(make_step("fedhypevae patients"))
    clean = statistics_sum(SPEC, batch_of(without(data, TARGET)))
    honest = getattr(statistics, function)

    def poisoned(*args: Any) -> Tensor:
        out = honest(*args).clone()
        out[TARGET] = value
        return out

    monkeypatch.setattr(statistics, function, poisoned)
    gap = moved_by(statistics_sum(SPEC, batch_of(data)).tensors, clean.tensors)
    assert gap <= SPEC.sensitivity * (1 + 1e-9)


@pytest.mark.parametrize("value", [*POISONS, 3e38, 0.0, 1e20])
def test_no_record_ends_the_release_of_statistics(value: float) -> None:
    data = make_data(make_step("fedhypevae patients"))
    for rows in ([0], [TARGET], list(range(len(data.labels)))):
        data.embeddings[rows] = value
        released = release_statistics(SPEC, batch_of(data), 4.0, SecureNoise())
        assert {name: value.shape for name, value in released.items()} == SPEC.shapes
        assert all(bool(torch.isfinite(part).all()) for part in released.values())


# --- the attack: a norm of zero beside a sum that overflows -----------------------------------------------------------

HUGE = float(torch.finfo(torch.float32).max)


@pytest.mark.parametrize("length", [1e6, 1e12, 1e30, HUGE / 8, HUGE])  # an eighth has a norm, a hundred no sum
@pytest.mark.parametrize("right", [0.0, 1e-42, 1e-30])
@pytest.mark.parametrize("kind", ["shared", "outer", "vectors"])
@pytest.mark.parametrize("where", ["processor", "gpu"])
def test_long_factors_without_a_norm_do_not_overflow_the_sum(
    where: str, kind: str, right: float, length: float
) -> None:
    """The norm counts left x right as (nearly) nothing; the left sides alone add up to more than float32 holds."""

    def total(units: int) -> Tensor:
        left = torch.full((units, 4), length)
        factors = clipping.GradientFactors()
        if kind == "shared":
            factors.add_shared("w", left, torch.full((3,), right))
        elif kind == "outer":
            factors.add_outer("w", left[:, None, :], torch.full((units, 1, 3), right))
        else:  # parts that cancel have no norm together either
            factors.add_vector("b", left)
            factors.add_vector("b", -left)
        with summing(where):
            sums = clipping.clipped_gradient_sum([factors, factors], {"w": (4, 3), "b": (4,)}, 0.03).tensors
        return torch.cat([sums["w"].flatten(), sums["b"]])

    for units in (1, 2, 100):
        gap = total(units) - total(units - 1)  # in each of two parts
        assert float(gap.double().norm()) <= 2 * 0.03 * (1 + 1e-5)


@pytest.mark.parametrize("zeroed", ["trunk", "code"])
def test_a_server_reads_no_record_from_whether_a_step_fails(zeroed: str) -> None:
    """Class columns near the largest float32 beside features of zero: the sum over units fits with a unit less only."""
    step = make_step("fedhypevae scores", clip_norm=10.0)
    data = make_data(step)
    for power in range(0, 39, 2):
        params = {name: torch.zeros_like(value) for name, value in step.params.items()}
        site = step.site
        if zeroed == "code":  # features of the trunk, times a code that is nothing
            params |= {name: step.params[name] for name in params if name.startswith("trunk.")}
            site = replace(site, tensors={**site.tensors, "code": 1e-42 * site.tensors["code"]})
        params["decoder.0.class_weight"][2, 1] = min(10.0**power, HUGE / UNITS)
        crafted = replace(step, params=params, site=site)
        gap = moved_by(step_sum(crafted, data), step_sum(crafted, without(data, TARGET)))
        assert gap <= step.sensitivity * (1 + 1e-5), power
