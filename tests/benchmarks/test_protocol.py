"""The protocol's partitions and splits: what is fixed, what the seed decides, no record in two places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.protocol import (
    BenchmarkSite,
    Federation,
    leave_one_site_out,
    load_federations,
    organ_federation,
    pooled_training_rows,
    real_federation,
    small_federation,
)
from benchmarks.sources import Pool
from common.errors import ConfigError, DataError


def _numbered(rows: int = 400, classes: int = 4) -> Pool:
    """A pool whose one embedding coordinate is the row's number."""
    numbers = np.arange(rows, dtype=np.float32)[:, None]
    labels = (np.arange(rows) % classes).astype(np.int64)
    return Pool(numbers, labels, tuple(f"class {label}" for label in range(classes)))


def _real(rows: int = 300) -> Pool:
    """Three sites of lesions with three rows each; lesion 0 has rows at two sites."""
    pool = _numbered(rows, 2)
    groups = np.arange(rows, dtype=np.int64) // 3
    sites = np.asarray(["a", "b", "c"])[groups % 3]
    sites[2] = "b"
    labels = groups % 2
    return Pool(pool.embeddings, labels, pool.class_names, sites, groups)


def _numbers(site: BenchmarkSite) -> list[set[float]]:
    return [set(part.embeddings[:, 0].tolist()) for part in (site.train, site.validation, site.test)]


def test_organ_federation_puts_each_row_in_one_split_of_one_site() -> None:
    federation = organ_federation(_numbered(), seed=3, num_sites=5)
    parts = [part for site in federation.sites for part in _numbers(site)]
    assert sum(len(part) for part in parts) == 400
    assert set.union(*parts) == set(range(400))
    shares = [len(part) / 400 for part in (set.union(*(_numbers(s)[at] for s in federation.sites)) for at in range(3))]
    assert shares == pytest.approx([0.64, 0.16, 0.20], abs=0.03)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_the_partition_is_fixed_and_the_seed_decides_the_splits(alpha: float | None) -> None:
    first, again, other = (organ_federation(_numbered(), seed, 4, alpha) for seed in (1, 1, 2))
    for one, same, changed in zip(first.sites, again.sites, other.sites, strict=True):
        assert _numbers(one) == _numbers(same)
        assert set.union(*_numbers(one)) == set.union(*_numbers(changed))
        assert _numbers(one) != _numbers(changed)


def test_dirichlet_sites_are_skewed() -> None:
    federation = organ_federation(_numbered(), seed=1, num_sites=4, alpha=0.1)
    largest = [
        float(torch.bincount(site.train.labels, minlength=4).max() / len(site.train.labels))
        for site in federation.sites
    ]
    assert max(largest) > 0.6


def test_small_federation_shares_the_rest_as_test_set() -> None:
    federation = small_federation(_numbered(), seed=1, num_sites=3, rows_per_site=50)
    own = [set.union(*_numbers(site)[:2]) for site in federation.sites]
    test = federation.sites[0].test
    assert all(site.test is test for site in federation.sites)
    assert len(test.labels) == 400 - 150
    assert not set.union(*own) & set(test.embeddings[:, 0].tolist())
    assert all(len(one & two) == 0 for at, one in enumerate(own) for two in own[:at])
    with pytest.raises(ConfigError, match="400"):
        small_federation(_numbered(), seed=1, num_sites=8, rows_per_site=50)


def _units(groups: Tensor | None) -> set[int]:
    assert groups is not None
    return set(groups.tolist())


def test_real_federation_keeps_a_unit_in_one_split() -> None:
    federation = real_federation(_real(), "real", seed=1)
    assert [site.name for site in federation.sites] == ["a", "b", "c"]
    for site in federation.sites:
        train, validation, test = (_units(part.groups) for part in (site.train, site.validation, site.test))
        assert len(test) > 0
        assert not train & validation
        assert not (train | validation) & test


def test_leave_one_site_out_tests_on_the_missing_site_without_shared_units() -> None:
    folds = leave_one_site_out(_real(), "real-loso", seed=1)
    assert [fold.held_out for fold in folds] == ["a", "b", "c"]
    for fold in folds:
        assert [site.name for site in fold.sites] == [name for name in "abc" if name != fold.held_out]
        seen = set.union(*(_units(part.groups) for site in fold.sites for part in (site.train, site.validation)))
        tested = _units(fold.sites[0].test.groups)
        assert not seen & tested
        # Lesion 0 is at sites a and b: it tests neither.
        assert 0 not in tested
        assert fold.sites[0].test is fold.sites[1].test
    # A site trains on the same rows in every fold, and where no site is left out.
    whole = real_federation(_real(), "real", seed=1)
    assert torch.equal(folds[0].sites[0].train.embeddings, folds[2].sites[1].train.embeddings)
    assert torch.equal(folds[0].sites[0].train.embeddings, whole.sites[1].train.embeddings)


def test_pooled_training_rows_joins_the_sites() -> None:
    federation = real_federation(_real(), "real", seed=1)
    pooled = pooled_training_rows(federation)
    assert len(pooled.labels) == sum(len(site.train.labels) for site in federation.sites)
    assert _units(pooled.groups) == set.union(*(_units(site.train.groups) for site in federation.sites))
    assert pooled_training_rows(organ_federation(_numbered(), 1)).groups is None


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="organ-iid"):
        load_federations("organ", 1)
    with pytest.raises(DataError, match="no such file"):
        load_federations("organ-iid", 1, tmp_path)
    with pytest.raises(ConfigError, match="real sites"):
        real_federation(_numbered(), "organ", 1)


def test_federation_reports_its_shape() -> None:
    federation: Federation = organ_federation(_numbered(), seed=1)
    assert (federation.num_classes, federation.width, len(federation.sites)) == (4, 1, 10)
