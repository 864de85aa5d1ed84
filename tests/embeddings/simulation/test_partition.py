from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from common.evaluation.splits import split_site, unit_classes
from embeddings.simulation.partition import (
    partition_by_column,
    partition_by_patient,
    partition_dirichlet,
    partition_iid,
)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), rows=st.integers(30, 300), sites=st.integers(1, 6), alpha=st.floats(0.3, 50.0))
def test_partitions_give_each_row_to_one_site(seed: int, rows: int, sites: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, rows)
    groups = rng.integers(0, rows // 3, rows)
    groups[:sites] = np.arange(rows, rows + sites)
    for parts in (
        partition_iid(labels, sites, rng),
        partition_dirichlet(labels, sites, alpha, rng),
        partition_by_patient(groups, sites, rng),
        list(partition_by_column([f"c{label}" for label in labels]).values()),
    ):
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(rows))
        assert all(part.size for part in parts)


def test_partition_iid_sizes_differ_by_one_at_most(rng: np.random.Generator) -> None:
    sizes = [part.size for part in partition_iid(np.zeros(103, dtype=np.int64), 4, rng)]
    assert sorted(sizes) == [25, 26, 26, 26]


def test_partition_dirichlet_large_alpha_is_even_and_small_alpha_is_not(rng: np.random.Generator) -> None:
    labels = np.repeat(np.arange(5), 400)
    even = partition_dirichlet(labels, 4, 1e6, rng)
    for part in even:
        np.testing.assert_allclose(np.bincount(labels[part], minlength=5), 100, atol=2)
    skewed = partition_dirichlet(labels, 4, 0.1, rng)
    largest = [max(np.bincount(labels[part], minlength=5)[label] for part in skewed) for label in range(5)]
    assert np.mean(largest) > 250


def test_partition_dirichlet_share_has_the_laws_mean_and_variance(rng: np.random.Generator) -> None:
    """Of a symmetric Dirichlet law over S: mean 1/S, variance (S-1)/(S²(Sα+1))."""
    labels = np.zeros(10_000, dtype=np.int64)
    shares = np.asarray([partition_dirichlet(labels, 3, 2.0, rng)[0].size / 10_000 for _ in range(3_000)])
    assert abs(shares.mean() - 1 / 3) < 0.015
    assert abs(shares.var() - 2 / (9 * 7)) < 0.003


def test_partition_dirichlet_gives_up_clearly(rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="larger alpha or fewer sites"):
        partition_dirichlet(np.zeros(8, dtype=np.int64), 8, 1e-3, rng)
    with pytest.raises(ConfigError, match="above 0"):
        partition_dirichlet(np.zeros(8, dtype=np.int64), 2, 0.0, rng)


def test_partition_refuses_fewer_rows_than_sites(rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="at least 5 rows"):
        partition_iid(np.zeros(4, dtype=np.int64), 5, rng)
    with pytest.raises(ConfigError, match="at least 1"):
        partition_iid(np.zeros(4, dtype=np.int64), 0, rng)
    with pytest.raises(DataError, match="at least 3 patients"):
        partition_by_patient(np.asarray([1, 1, 2]), 3, rng)


def test_partition_by_patient_never_splits_a_patient(rng: np.random.Generator) -> None:
    groups = rng.integers(0, 80, 500)
    parts = partition_by_patient(groups, 4, rng)
    owners = [set(groups[part]) for part in parts]
    assert sum(map(len, owners)) == len(set(groups))
    assert max(part.size for part in parts) - min(part.size for part in parts) <= np.bincount(groups).max()


def test_partition_is_a_function_of_the_generator() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    first, second = (partition_dirichlet(labels, 3, 0.5, np.random.default_rng(9)) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_split_site_shares_hold_per_class(rng: np.random.Generator) -> None:
    labels = np.repeat([0, 1, 2], [1000, 100, 50])
    splits = split_site(labels, rng)
    for label, size in ((0, 1000), (1, 100), (2, 50)):
        counts = [(splits[labels == label] == name).sum() for name in ("train", "validation", "test")]
        np.testing.assert_allclose(counts, np.asarray([0.64, 0.16, 0.20]) * size, atol=1.0)


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (2, 0, 1)), (4, (2, 1, 1))])
def test_split_site_with_few_records_trains_first(
    count: int, expected: tuple[int, int, int], rng: np.random.Generator
) -> None:
    splits = split_site(np.zeros(count, dtype=np.int64), rng)
    assert tuple((splits == name).sum() for name in ("train", "validation", "test")) == expected


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_split_site_never_splits_a_patient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 60, 300)
    labels = rng.integers(0, 4, 300)
    splits = split_site(labels, rng, groups)
    for patient in np.unique(groups):
        assert len(set(splits[groups == patient])) == 1
    assert 0.5 < (splits == "train").mean() < 0.75


def test_unit_of_findings_is_dealt_out_under_its_rarest_one() -> None:
    labels = np.asarray([[1, 0, 1], [1, 1, -1], [0, 0, 1], [-1, 0, 0], [1, 0, 0]], dtype=np.int8)
    assert unit_classes(labels, np.arange(5)).tolist() == [2, 1, 2, 3, 0]  # the fourth has no finding
    assert unit_classes(labels, np.asarray([0, 0, 1, 1, 2])).tolist() == [1, 2, 0]  # patients' findings together
    assert unit_classes(np.full((2, 3), -1, dtype=np.int8), np.arange(2)).tolist() == [3, 3]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_split_site_of_findings_keeps_patients_and_spreads_rare_findings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random((300, 4)) < [0.5, 0.3, 0.0, 0.0]).astype(np.int8)
    labels[:10, 2] = 1
    labels[10:20, 3] = -1
    splits = split_site(labels, rng)
    assert [(splits[labels[:, 2] == 1] == name).sum() for name in ("train", "validation", "test")] == [6, 2, 2]
    groups = rng.integers(0, 60, 300)
    splits = split_site(labels, rng, groups)
    assert all(len(set(splits[groups == patient])) == 1 for patient in np.unique(groups))
    assert 0.35 < (splits == "train").mean() < 0.9
