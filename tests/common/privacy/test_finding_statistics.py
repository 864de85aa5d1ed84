"""Statistics of findings: by hand, and moved by no unit further than they state; broken versions are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import ConfigError
from common.privacy.clipping import ClippedSum
from common.privacy.combined import combine_statistics
from common.privacy.noise import TestNoise
from common.privacy.sampling import draw_units
from common.privacy.statistics import StatisticsSpec, release_statistics, statistics_sum
from common.records import SiteData, UnitBatch, among_all

FINDINGS, DIM = 5, 3
_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def spec(**changes: Any) -> StatisticsSpec:
    return StatisticsSpec(DIM, FINDINGS, **{"count_weight": 0.6, "max_positives": 2, "max_unknowns": 1, **changes})


def batch_of(labels: Tensor, embeddings: Tensor, rows: int = 1, groups: Tensor | None = None) -> UnitBatch:
    return draw_units(SiteData(embeddings, labels.to(torch.int8), groups), 1.0, rows, TestNoise(0))


def joint_norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def test_statistics_of_findings_by_hand() -> None:
    labels = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, -1, 0], [0, 0, 0, 0, 0]])
    embeddings = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.5, 0.0], [0.3, 0.0, 0.0]])
    wanted = spec(max_positives=2, max_unknowns=1, unknown_weight=0.3, pair_weight=0.6)
    # a record, two positives, an unknown one, a pair, two sums, the total
    square = 0.36 * 3 + 0.09 + 0.36 + 2.0 + 1.0
    assert wanted.sensitivity == pytest.approx(math.sqrt(square))
    released = release_statistics(wanted, batch_of(labels, embeddings), 0.0, TestNoise(0))
    assert float(released["records"]) == pytest.approx(3.0)
    assert released["class_counts"].tolist() == pytest.approx([1.0, 2.0, 0.0, 0.0, 0.0])
    assert released["unknown_counts"].tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0, 0.0])
    assert torch.allclose(released["class_sums"][1], torch.tensor([0.6, 1.3, 0.0]))
    combined = combine_statistics(wanted, [released, released], 0.0)
    assert combined.total == pytest.approx(6.0)
    assert torch.allclose(combined.centre, torch.tensor([0.3, 1.3 / 3, 0.0]))
    assert combined.pair_counts is not None
    assert combined.known_counts is not None
    assert combined.prevalence is not None
    assert float(combined.pair_counts[0, 1]) == float(combined.pair_counts[1, 0]) == pytest.approx(2.0)
    assert float(combined.pair_counts.sum()) == pytest.approx(4.0)
    assert combined.known_counts.tolist() == pytest.approx([6.0, 6.0, 6.0, 4.0, 6.0])
    assert combined.prevalence[:2].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert bool((combined.prevalence[2:] > 0).all())  # a count of 0, or below, still gives a share


def test_sites_that_label_different_findings_are_counted_by_hand() -> None:
    """The first site labels findings 0 and 1, the second 1 to 4: what a site does not label costs none of its cap."""
    wanted = spec(max_positives=2, max_unknowns=1, label_sets=((0, 1), (1, 2, 3, 4)))
    rows = torch.eye(DIM)[:2] / 2
    first = among_all(torch.tensor([[1, 0], [-1, 1]], dtype=torch.int8), "ab", "abcde")
    second = among_all(torch.tensor([[1, 1, 0, 0], [0, 0, -1, 0]], dtype=torch.int8), "bcde", "abcde")
    assert first.tolist() == [[1, 0, -1, -1, -1], [-1, 1, -1, -1, -1]]
    released = []
    for number, labels in enumerate((first, second)):
        batch = draw_units(SiteData(rows, labels, None, number), 1.0, 1, TestNoise(0))
        released.append(release_statistics(wanted, batch, 0.0, TestNoise(0)))
    assert released[0]["records"].tolist() == pytest.approx([2.0, 0.0])
    assert released[1]["records"].tolist() == pytest.approx([0.0, 2.0])
    assert released[0]["unknown_counts"].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0, 0.0])
    combined = combine_statistics(wanted, released, 0.0)
    assert combined.total == pytest.approx(4.0)
    assert combined.known_counts is not None
    assert combined.known_counts.tolist() == pytest.approx([1.0, 4.0, 2.0, 1.0, 2.0])
    with pytest.raises(ConfigError, match="no site had when the run began"):
        statistics_sum(wanted, draw_units(SiteData(rows, first, None, -1), 1.0, 1, TestNoise(0)))


def test_the_sensitivity_of_findings_is_reached_and_full_knowledge_costs_nothing() -> None:
    at_the_caps = torch.tensor([[1, 1, 0, 0, -1]])
    axis = torch.tensor([[1.0, 0.0, 0.0]])
    one = statistics_sum(spec(), batch_of(at_the_caps, axis))
    assert joint_norm(one.tensors) == pytest.approx(spec().sensitivity)
    known = statistics_sum(spec(), batch_of(torch.tensor([[1, 1, 0, 0, 0]]), axis))
    assert joint_norm(known.tensors) < joint_norm(one.tensors)


def test_a_record_beyond_a_cap_is_scaled_down_as_a_whole() -> None:
    axis = torch.tensor([[1.0, 0.0, 0.0]])
    for labels in ([1, 1, 1, 1, 1], [1, 1, -1, -1, -1]):
        summed = statistics_sum(spec(), batch_of(torch.tensor([labels]), axis)).tensors
        assert joint_norm(summed) == pytest.approx(spec().sensitivity)
        counted = float(summed["records"]) / 0.6
        assert 0.0 < counted < 1.0
        assert torch.allclose(summed["class_sums"][0], counted * axis[0].double())


# --- neighbouring sets --------------------------------------------------------------------------------------------

Release = Callable[[UnitBatch], ClippedSum]
_LABELS = st.one_of(
    st.lists(st.sampled_from([1, 0, -1]), min_size=FINDINGS, max_size=FINDINGS),
    st.lists(st.sampled_from([1, 0]), min_size=FINDINGS, max_size=FINDINGS),  # fully known
    st.sampled_from([[1] * FINDINGS, [-1] * FINDINGS, [0] * FINDINGS, [1, 1, 0, 0, -1]]),
)


def check_neighbours(release: Release, batch: UnitBatch, removed: int) -> None:
    """Refuse a release that one unit moves by more than it states (AssertionError)."""
    others = [unit for unit in range(batch.mask.shape[0]) if unit != removed]
    without = replace(batch, **{name: getattr(batch, name)[others] for name in ("embeddings", "labels", "mask")})
    whole, rest = release(batch), release(without)
    assert whole.sensitivity == rest.sensitivity
    gap = {name: whole.tensors[name] - rest.tensors[name] for name in whole.tensors}
    assert joint_norm(gap) <= whole.sensitivity * (1 + 1e-9), (joint_norm(gap), whole.sensitivity)


@given(
    labels=st.lists(st.lists(_LABELS, min_size=2, max_size=2), min_size=3, max_size=3),
    powers=st.lists(st.sampled_from([0.0, 1.0, 1.0, 1e-20, 1e30, math.nan, math.inf]), min_size=6, max_size=6),
    rows=st.sampled_from([1, 2]),
    caps=st.tuples(st.integers(1, FINDINGS), st.integers(0, FINDINGS)),
    moment=st.sampled_from([0.0, 1.0]),
    sets=st.sampled_from([(), ((0, 1), (1, 2, 4)), ((2,), (0, 1, 2, 3, 4))]),
    removed=st.integers(0, 2),
    seed=st.integers(0, 30),
)
@settings(max_examples=150, **_SETTINGS)
def test_statistics_of_findings_move_by_at_most_their_sensitivity(
    labels, powers, rows, caps, moment, sets, removed, seed
) -> None:
    wanted = spec(max_positives=caps[0], max_unknowns=caps[1], moment_weight=moment, label_sets=sets)
    embeddings = torch.randn(6, DIM, generator=torch.Generator().manual_seed(seed)) * torch.tensor(powers)[:, None]
    shown = torch.tensor(labels, dtype=torch.int8)[:, :rows]
    batch = UnitBatch(embeddings.view(3, 2, DIM)[:, :rows], shown, torch.ones(3, rows), len(sets) // 2)
    check_neighbours(lambda units: statistics_sum(wanted, units), batch, removed)


def _known_counted(batch: UnitBatch) -> ClippedSum:
    """Counts what is known in place of what is unknown, for the same noise: K of them a record."""
    summed = statistics_sum(spec(), batch)
    known = (batch.labels >= 0).double().sum((0, 1))
    return replace(summed, tensors={**summed.tensors, "unknown_counts": 0.3 * known})


def _caps_not_held(batch: UnitBatch) -> ClippedSum:
    """States the caps, and leaves records beyond them whole."""
    loose = statistics_sum(spec(max_positives=FINDINGS, max_unknowns=FINDINGS), batch)
    return replace(loose, sensitivity=spec().sensitivity)


def _pairs_for_nothing(batch: UnitBatch) -> ClippedSum:
    """Releases pairs that the sensitivity does not pay for."""
    summed = statistics_sum(spec(), batch)
    return replace(summed, sensitivity=math.sqrt(summed.sensitivity**2 - 0.36))


def _records_by_themselves(batch: UnitBatch) -> ClippedSum:
    """Clips the records of a patient one by one."""
    return statistics_sum(
        spec(), UnitBatch(*(part.flatten(0, 1)[:, None] for part in (batch.embeddings, batch.labels, batch.mask)))
    )


@pytest.mark.parametrize(
    "broken", [_known_counted, _caps_not_held, _pairs_for_nothing, _records_by_themselves], ids=lambda f: f.__name__
)
def test_broken_statistics_of_findings_are_refused(broken: Release) -> None:
    axis, refused = torch.tensor([1.0, 0.0, 0.0]).expand(2, 2, DIM), 0
    for labels in ([1, 1, 0, 0, 0], [1] * FINDINGS, [1, 1, 0, 0, -1], [0] * FINDINGS):
        batch = UnitBatch(axis, torch.tensor(labels, dtype=torch.int8).expand(2, 2, FINDINGS), torch.ones(2, 2))
        rows = 2 if broken is _records_by_themselves else 1
        batch = UnitBatch(batch.embeddings[:, :rows], batch.labels[:, :rows], batch.mask[:, :rows])
        check_neighbours(lambda units: statistics_sum(spec(), units), batch, 0)  # the control
        try:
            check_neighbours(broken, batch, 0)
        except AssertionError:
            refused += 1
    assert refused > 0
