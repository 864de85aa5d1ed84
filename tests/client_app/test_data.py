"""A site's records: how they are divided, and the share of a pool that a simulated site has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from client_app import records as data
from client_app.place import find_place
from common.config.run import RunConfig
from common.errors import DataError
from common.evaluation.splits import split_by_unit
from common.wire.identity import EncoderIdentity
from embeddings.simulation import simulated
from embeddings.store import file as store
from embeddings.store.sets import EmbeddingSet, SetMetadata
from embeddings.store.writing import write_store
from tests.harness import make_set


def _write_pool(path: Path, rows: int) -> Path:
    identity = EncoderIdentity("made-up", "1", 4, "none", "0" * 64, "float32", ("a", "b"))
    values = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    labels = (np.arange(rows) % 2).astype(np.int64)
    write_store(path, EmbeddingSet(values, labels, SetMetadata(identity)))
    return path


def test_simulated_sites_of_a_process_read_and_deal_their_pool_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = _write_pool(tmp_path / "pool.parquet", 60)
    done: list[str] = []
    read, deal = store.read_usable, simulated.deal
    monkeypatch.setattr(store, "read_usable", lambda path: done.append("read") or read(path))
    monkeypatch.setattr(simulated, "deal", lambda *dealt: done.append("deal") or deal(*dealt))
    first = data.Simulated(0, 3, 0.0, 7, pool)
    parts = [data.load_records(dataclasses.replace(first, index=index), tmp_path) for index in range(3)]
    assert done == ["read", "deal"]
    rows = np.concatenate([part.embeddings for part in parts])
    assert len(np.unique(rows, axis=0)) == 60  # each row at one site


def test_simulated_sites_take_pools_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDHYPEVAE_HOME", str(tmp_path))
    config = RunConfig.from_flat({"method": "mh_pfedhn", "own-encoders": True, "pool": "a.parquet, b.parquet"})
    found = [find_place({"partition-id": index, "num-partitions": 3}, config).records for index in range(3)]
    assert [one.pool for one in found if isinstance(one, data.Simulated)] == [
        tmp_path / name for name in ("a.parquet", "b.parquet", "a.parquet")
    ]


def test_a_simulation_without_its_pool_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fedhypevae embed"):
        data.load_records(data.Simulated(0, 3, 0.0, 7, tmp_path / "missing.parquet"), tmp_path)


@pytest.mark.parametrize("patients", [False, True])
def test_split_by_unit_moves_nobody_else_when_one_joins_or_leaves(patients: bool) -> None:
    """Neighbouring data sets have neighbouring training rows: else the promise would be about the split alone."""
    records = make_set(300, patients=patients)
    whole = split_by_unit(records.embeddings, records.groups)
    for row in range(0, 300, 3):
        kept = np.arange(300) // 3 != row // 3 if patients else np.arange(300) != row
        fewer = records.take(kept)
        assert np.array_equal(split_by_unit(fewer.embeddings, fewer.groups), whole[kept])
    share = np.mean(whole == "train")
    assert 0.5 < share < 0.78


def test_split_by_unit_keeps_patients_together() -> None:
    records = make_set(300, patients=True)
    parts = split_by_unit(records.embeddings, records.groups)
    assert records.groups is not None
    assert all(len(set(parts[records.groups == patient])) == 1 for patient in np.unique(records.groups))


@pytest.mark.parametrize(
    ("pool", "declared", "public"), [("", False, True), ("own.parquet", False, False), ("own.parquet", True, True)]
)
def test_pool_of_a_simulation_is_public_only_where_the_run_says_so(pool: str, declared: bool, public: bool) -> None:
    """A hospital may try a simulation on its own file: nothing of it leaves the simulated sites without noise."""
    config = RunConfig().replace(pool=pool, data_is_public=declared)
    node: dict[str, str | int | float | bool] = {"partition-id": 0, "num-partitions": 2}
    policy = find_place(node, config).policy
    assert (policy.data_is_public, policy.metrics_may_leave, policy.allow_test_noise) == (public, public, public)
