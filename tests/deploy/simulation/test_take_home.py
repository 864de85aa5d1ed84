"""What a hospital takes home: scores of its own model and of the mixed one, on its own patients and on all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.config.run import RunConfig
from deploy.simulation.take_home import Model, TakeHome, _missed, home_table, in_words, take_home
from embeddings.store.writing import write_store
from tests.harness import make_set


def test_a_class_is_missed_below_half() -> None:
    labels, decisions = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    assert _missed(labels, decisions, ("a", "b", "c", "d")) == ("c",)


def test_hospital_without_a_class_finds_it_with_the_shared_set(tmp_path: Path) -> None:
    pool = make_set(600)
    write_store(tmp_path / "pool.parquet", pool)
    settings = {"pool": "pool.parquet", "data-is-public": True, "alpha": 0.1, "seed": 3, "num-sites": 2, "min-sites": 2}
    config = RunConfig.from_flat(settings)
    shared = torch.from_numpy(pool.embeddings), torch.from_numpy(pool.labels)  # as good as a set can be
    found = take_home(tmp_path, config, shared)
    assert [one.site for one in found] == ["site-1", "site-2"]
    lost = [one for one in found if one.alone.missed]
    assert lost, "the split left every class at every site: choose a smaller alpha"
    for one in lost:
        assert set(one.with_set.missed) <= set(one.alone.missed)
        assert one.with_set.all_patients > one.alone.all_patients
    assert all(0 <= value <= 1 for one in found for value in (one.alone.own_patients, one.with_set.own_patients))


def test_words_and_table_give_the_means(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        TakeHome("site-1", Model(0.9, 0.5, ("a", "b")), Model(0.92, 0.8, ("a",))),
        TakeHome("site-2", Model(0.8, 0.3, ("c",)), Model(0.88, 0.7, ())),
    ]
    words = in_words(found, 11, 2.937)
    assert "misses 1.5 among the patients of all hospitals, and 0.5 with" in words
    assert "from 40 to 75 %" in words
    assert "epsilon 2.94" in words
    cells = [list(column.cells) for column in home_table(found).columns]
    assert np.array(cells).T.tolist() == [
        ["site-1", "90.0 to 92.0 %", "50.0 to 80.0 %", "2 to 1"],
        ["site-2", "80.0 to 88.0 %", "30.0 to 70.0 %", "1 to 0"],
        ["mean", "85.0 to 90.0 %", "40.0 to 75.0 %", "1.5 to 0.5"],
    ]
