"""Synthetic rows as parquet: back again as they were, the same bytes, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from common.errors import DataError
from common.publishing import parquet as bundle_parquet
from common.publishing.parquet import check_layout, read_notes, sha256_of, stream_rows, write_rows

NAMES = ("liver", "lung")


def blocks(count: int = 3, rows: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, 4, generator=generator), torch.arange(rows) % 2) for _ in range(count)]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    made = blocks()
    written = write_rows(tmp_path / "new" / "a.parquet", made, dim=4, class_names=NAMES, notes={"seed": 1})
    assert (written.rows, written.class_counts) == (15, (9, 6))
    path = tmp_path / "new" / "a.parquet"
    assert (written.size, written.sha256) == (path.stat().st_size, sha256_of(path))
    found = list(stream_rows(path, 4, 2))
    assert torch.equal(torch.cat([rows for rows, _ in found]), torch.cat([rows for rows, _ in made]))
    assert torch.equal(torch.cat([labels for _, labels in found]), torch.cat([labels for _, labels in made]))
    assert read_notes(path) == {"seed": 1}
    assert pq.ParquetFile(path).num_row_groups == 3
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a.parquet"]


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    digests = {
        write_rows(tmp_path / f"{place}.parquet", blocks(), dim=4, class_names=NAMES, notes={}).sha256
        for place in range(2)
    }
    assert len(digests) == 1


def test_failure_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield from blocks(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "a.parquet", broken(), dim=4, class_names=NAMES, notes={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dim", "classes", "words"), [(5, 2, "width 5"), (4, 1, "labels from 0 to 0")], ids=["width", "label"]
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, dim: int, classes: int, words: str) -> None:
    write_rows(tmp_path / "a.parquet", blocks(), dim=4, class_names=NAMES, notes={})
    with pytest.raises(DataError, match=words):
        list(stream_rows(tmp_path / "a.parquet", dim, classes))


def test_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    made = blocks(1)
    made[0][0][2, 1] = float("nan")
    write_rows(tmp_path / "a.parquet", made, dim=4, class_names=NAMES, notes={})
    with pytest.raises(DataError, match="not finite"):
        list(stream_rows(tmp_path / "a.parquet", 4, 2))


@pytest.mark.parametrize("kind", ["text", "columns", "empty", "ragged"])
def test_other_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    if kind == "text":
        path.write_text("no parquet")
    elif kind == "columns":
        pq.write_table(pa.table({"x": [1, 2]}), path)
    elif kind == "empty":
        write_rows(path, [], dim=4, class_names=NAMES, notes={})
    else:
        pq.write_table(pa.table({"embedding": [[1.0], [1.0, 2.0]], "label": np.array([0, 1])}), path)
    with pytest.raises(DataError):
        list(stream_rows(path, 4, 2))


@pytest.mark.parametrize("hidden", ["nothing", "column", "second key", "type", "metadata", "of a field", "bytes"])
def test_check_layout_refuses_what_no_reader_of_the_set_sees(tmp_path: Path, hidden: str) -> None:
    """A third column, another key of the metadata, bytes between columns and footer: each could hold records."""
    path = tmp_path / "rows.parquet"
    write_rows(path, [(torch.rand(9, 4), torch.arange(9) % 2)], dim=4, class_names=("a", "b"), notes={})
    table = pq.read_table(path)
    if hidden == "column":
        pq.write_table(table.append_column("more", pa.array(range(9))), path)
    elif hidden == "second key":  # pyarrow shows one of the two
        schema = bundle_parquet._schema(4, ("a", "b"), b"{}")
        with pq.ParquetWriter(path, schema) as writer:
            writer.write_table(table.cast(schema))
            honest = table.schema.metadata[b"huggingface"].decode()
            writer.add_key_value_metadata({"huggingfacf": honest, "huggingfacg": "record" * 400})
        content = path.read_bytes().replace(b"huggingfacf", b"huggingface").replace(b"huggingfacg", b"huggingface")
        path.write_bytes(content)
    elif hidden == "type":
        pq.write_table(table.set_column(1, "label", table["label"].cast(pa.int32())), path)
    elif hidden == "metadata":
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"more": b"x"}), path)
    elif hidden == "of a field":
        noted = pa.schema([table.schema.field(0), table.schema.field(1).with_metadata({"record": "1"})])
        pq.write_table(table.cast(noted.with_metadata(table.schema.metadata)), path)
    elif hidden == "bytes":
        content = path.read_bytes()
        end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        path.write_bytes(content[:end] + b"record" + content[end:])
        assert pq.read_table(path).equals(table)
    if hidden == "nothing":
        check_layout(path, 4, ("a", "b"))
    else:
        with pytest.raises(DataError):
            check_layout(path, 4, ("a", "b"))
