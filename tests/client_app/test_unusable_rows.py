"""Rows that a run can't use add nothing, each by itself, and end no run; where data enters, their numbers are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from client_app.records import load_records
from client_app.release.last_resort import LOGGED
from common.errors import DataError
from common.evaluation.splits import split_by_unit
from embeddings.store.file import read_store, read_usable
from embeddings.store.writing import write_store
from tests.harness import Federation, make_set

ROW = 11


def spoil(path: Path, column: str, change: Any) -> None:
    """Rewrite one column of a store with the same schema, as no command of ours would."""
    table = pq.read_table(path)
    index = table.schema.get_field_index(column)
    made = change(table.column(column).combine_chunks())
    pq.write_table(table.set_column(index, pa.field(column, made.type), made), path)


def with_values(value: float, columns: slice = slice(3, 4)) -> Any:
    def change(column: Any) -> Any:
        rows = np.array(column.flatten()).reshape(len(column), -1).copy()
        rows[ROW, columns] = value
        return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])

    return change


def with_label(value: int | None) -> Any:
    def change(column: Any) -> Any:
        labels: list[int | None] = column.to_pylist()
        labels[ROW] = value
        return pa.array(labels, type=pa.int64())

    return change


def with_empty_cell(column: Any) -> Any:
    rows: list[list[float] | None] = column.to_pylist()
    rows[ROW] = None
    return pa.array(rows, type=column.type)


def with_empty_value(column: Any) -> Any:
    rows: list[list[float | None]] = column.to_pylist()
    rows[ROW][2] = None
    return pa.array(rows, type=column.type)


UNUSABLE: dict[str, tuple[str, Any]] = {
    "not a number": ("embedding", with_values(np.nan)),
    "infinite": ("embedding", with_values(-np.inf)),
    "all zero": ("embedding", with_values(0.0, slice(None))),
    "a label of no class": ("label", with_label(3)),
    "a negative label": ("label", with_label(-1)),
    "a huge label": ("label", with_label(2**62)),
    "no label": ("label", with_label(None)),
    "no embedding": ("embedding", with_empty_cell),
    "an embedding with a gap": ("embedding", with_empty_value),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_row_is_left_out_by_itself(tmp_path: Path, case: str) -> None:
    path = tmp_path / "site.parquet"
    records = make_set(60)
    write_store(path, records)
    spoil(path, *UNUSABLE[case])
    with pytest.raises(DataError):
        read_store(path)
    others = np.arange(60) != ROW
    left = load_records(path, tmp_path)
    assert np.array_equal(left.embeddings, records.embeddings[others])
    assert np.array_equal(left.labels, records.labels[others])
    assert left.splits is not None
    assert np.array_equal(left.splits, split_by_unit(records.embeddings, records.groups)[others])


@pytest.mark.parametrize("case", ["not a number", "all zero", "a huge label", "no embedding"])
def test_run_goes_on_with_the_other_rows(tmp_path: Path, case: str) -> None:
    federation = Federation.create(tmp_path, 2)
    spoil(federation.sites[0].folder / "site.parquet", *UNUSABLE[case])
    summary = federation.run(num_rounds=1)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]]
    assert LOGGED not in federation.sites[0].log()
    for bad, good in zip(federation.sent("site-1"), federation.sent("site-2"), strict=True):
        assert len(bad.wire) == len(good.wire)


def test_site_without_a_usable_row_takes_part_unnoticed(tmp_path: Path) -> None:
    federation = Federation.create(tmp_path, 2)

    def nothing(column: Any) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.full(60 * 12, np.nan, dtype=np.float32)), 12)

    spoil(federation.sites[0].folder / "site.parquet", "embedding", nothing)
    summary = federation.run(num_rounds=2)
    assert summary["rounds_taken_part"] == [["site-1", "site-2"]] * 2
    assert LOGGED not in federation.sites[0].log()


def test_all_zero_rows_are_refused_by_number_where_data_enters(tmp_path: Path) -> None:
    records = make_set(60)
    records.embeddings[7] = 0.0
    with pytest.raises(DataError, match=r"all zero, found 1 such rows: row 7 \(from 0\)"):
        write_store(tmp_path / "site.parquet", records)


def test_changed_content_is_found_before_a_run_and_stops_none(tmp_path: Path) -> None:
    path = tmp_path / "site.parquet"
    write_store(path, make_set(60))
    spoil(path, "embedding", with_values(1.0))
    with pytest.raises(DataError, match="fingerprint"):
        read_store(path)
    assert torch.from_numpy(read_usable(path).embeddings).shape == (60, 12)
