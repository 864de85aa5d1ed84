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

from common.durable import sha256_of
from common.errors import DataError
from common.publishing import parquet as bundle_parquet
from common.publishing.parquet import check_layout, read_notes, stream_rows, write_rows

NAMES = ("liver", "lung")
# As the writer sets them: a file written so differs from its files by nothing else.
PACKED = {"compression": "zstd", "use_dictionary": False, "write_statistics": ["label"]}
WRITTEN = {**PACKED, "use_byte_stream_split": ["embedding.list.element"]}


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


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        ("nothing", ""),
        ("column", "the columns embedding and label"),
        ("second key", "more in its footer"),
        ("type", "the columns embedding and label"),
        ("metadata", "the columns embedding and label"),
        ("of a field", "the columns embedding and label"),
        ("bytes", "bytes that belong to no column"),
    ],
)
def test_check_layout_refuses_what_no_reader_of_the_set_sees(tmp_path: Path, hidden: str, words: str) -> None:
    """A third column, another key of the metadata, bytes between columns and footer: each could hold records.

    The rest of each file is as the writer makes it, so that nothing but what is hidden can be the reason.
    """
    path = tmp_path / "rows.parquet"
    write_rows(path, [(torch.rand(9, 4), torch.arange(9) % 2)], dim=4, class_names=("a", "b"), notes={})
    table = pq.read_table(path)
    if hidden == "column":
        pq.write_table(table.append_column("more", pa.array(range(9))), path, **WRITTEN)
    elif hidden == "second key":  # pyarrow shows one of the two
        schema = bundle_parquet._schema(4, ("a", "b"), b"{}")
        with pq.ParquetWriter(path, schema, **WRITTEN) as writer:
            writer.write_table(table.cast(schema))
            honest = table.schema.metadata[b"huggingface"].decode()
            writer.add_key_value_metadata({"huggingfacf": honest, "huggingfacg": "record" * 400})
        content = path.read_bytes().replace(b"huggingfacf", b"huggingface").replace(b"huggingfacg", b"huggingface")
        path.write_bytes(content)
    elif hidden == "type":
        pq.write_table(table.set_column(1, "label", table["label"].cast(pa.int32())), path, **WRITTEN)
    elif hidden == "metadata":
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"more": b"x"}), path, **WRITTEN)
    elif hidden == "of a field":
        noted = pa.schema([table.schema.field(0), table.schema.field(1).with_metadata({"record": "1"})])
        pq.write_table(table.cast(noted.with_metadata(table.schema.metadata)), path, **WRITTEN)
    elif hidden == "bytes":
        content = path.read_bytes()
        end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        path.write_bytes(content[:end] + b"record" + content[end:])
        assert pq.read_table(path).equals(table)
    if hidden == "nothing":
        check_layout(path, 4, ("a", "b"))
    else:
        with pytest.raises(DataError, match=words):
            check_layout(path, 4, ("a", "b"))


def checked(path: Path, dim: int = 4) -> None:
    check_layout(path, dim, NAMES)


@pytest.mark.parametrize(
    ("sizes", "dim"),
    [((5, 1, 9), 4), ((0, 3), 4), ((1,), 1), ((45_000, 7), 8), ((3_000,), 512), ((50_000,), 15), ((3,), 100_000)],
    ids=["groups", "empty group", "one", "pages of rows", "pages of bytes", "levels", "wide"],
)
def test_check_layout_accepts_what_the_writer_writes(tmp_path: Path, sizes: tuple[int, ...], dim: int) -> None:
    path = tmp_path / "a.parquet"
    made = [(torch.randn(rows, dim), torch.arange(rows) % 2) for rows in sizes]
    write_rows(path, made, dim=dim, class_names=NAMES, notes={"seed": 1})
    checked(path, dim)
    bundle_parquet._check_unpacked(path, pq.read_metadata(path), dim)


def rewritten(path: Path, **settings: object) -> pa.Table:
    """The rows written again by pyarrow, each group as before; `settings` in place of the writer's own."""
    own = PACKED if "column_encoding" in settings else WRITTEN
    with pq.ParquetFile(path) as file:
        dim, size = file.schema_arrow.field("embedding").type.list_size, file.metadata.row_group(0).num_rows
        table = file.read().cast(bundle_parquet._schema(dim, NAMES, b"{}"))
    pq.write_table(table, path, row_group_size=size, **{**own, **settings})
    return table


@pytest.mark.parametrize(
    "settings",
    [
        {"compression": "gzip"},
        {"compression": "none"},
        {"use_dictionary": ["label"]},
        {"write_statistics": True},
        {"write_statistics": False},
        {"data_page_version": "2.0"},
        {"data_page_size": 8, "write_batch_size": 1},
        {"column_encoding": {"embedding.list.element": "PLAIN", "label": "PLAIN"}},
        {"column_encoding": {"embedding.list.element": "PLAIN", "label": "DELTA_BINARY_PACKED"}},
    ],
    ids=str,
)
def test_check_layout_refuses_rows_written_otherwise(tmp_path: Path, settings: dict[str, object]) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, blocks(2, 2_000), dim=4, class_names=NAMES, notes={})
    rewritten(path)
    checked(path)  # the writer's own settings
    table = rewritten(path, **settings)
    assert pq.read_table(path).equals(table)
    with pytest.raises(DataError, match="pages"):
        checked(path)


def test_check_layout_refuses_a_dictionary_whose_values_no_row_uses(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    hidden = np.concatenate([np.arange(2), 2**40 + np.arange(254)])
    schema = bundle_parquet._schema(4, NAMES, b"{}")
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(256 * 4, np.float32)), 4)
    table = pa.Table.from_arrays([column, pa.array(hidden)], schema=schema)
    pq.write_table(table, path, compression="none", use_dictionary=["label"], write_statistics=False)
    content, used = path.read_bytes(), bytes(range(256))  # one byte points to each row's label
    assert content.count(used) == 1
    path.write_bytes(content.replace(used, bytes([0, 1] * 128)))
    assert set(pq.read_table(path)["label"].to_pylist()) == {0, 1}
    assert (2**40 + 253).to_bytes(8, "little") in path.read_bytes()
    with pytest.raises(DataError, match="pages"):
        checked(path)


def test_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """One page of 64 MiB in a few kB: more than the writer puts in a page, whatever its rows explain."""
    path = tmp_path / "a.parquet"
    write_rows(path, [(torch.zeros(2**18, 64), torch.arange(2**18) % 2)], dim=64, class_names=NAMES, notes={})
    rewritten(path, data_page_size=2**30, max_rows_per_page=2**30)
    with pytest.raises(DataError, match="pages of about"):
        list(stream_rows(path, 64, 2))


@pytest.mark.parametrize("kind", ["statistics", "place"])
def test_check_layout_refuses_a_footer_that_hides_bytes(tmp_path: Path, kind: str) -> None:
    """Statistics that are no label's, and a second group that is read where the first lies."""
    path = tmp_path / "a.parquet"
    write_rows(path, blocks(1, 9) * 2, dim=4, class_names=NAMES, notes={})
    with pq.ParquetFile(path) as file:
        start = path.stat().st_size - 8 - file.metadata.serialized_size
        place = 2 * file.metadata.row_group(1).column(0).data_page_offset  # Thrift's zigzag: twice the number
    content = path.read_bytes()
    if kind == "statistics":
        old, new = b"\x08" + (1).to_bytes(8, "little"), b"\x08records!"
    else:
        old, new = bytes([0x26, place & 0x7F | 0x80, place >> 7]), bytes([0x26, 8 | 0x80, 0])
    assert old in content[start:]
    path.write_bytes(content[:start] + content[start:].replace(old, new))
    assert pq.read_table(path).num_rows == 18
    with pytest.raises(DataError, match="pages"):
        checked(path)


@pytest.mark.parametrize("column", [0, 1])
def test_pages_that_count_fewer_values_than_rows_are_refused(tmp_path: Path, column: int) -> None:
    """What a page holds beyond the values that it counts is read by nobody: it could be a record."""
    path = tmp_path / "a.parquet"
    write_rows(path, blocks(1, 9), dim=4, class_names=NAMES, notes={})
    with pq.ParquetFile(path) as file:
        place = file.metadata.row_group(0).column(column).data_page_offset
    content, values = path.read_bytes(), 36 if column == 0 else 9
    # the fifth field of a page's header is a struct, whose first number is twice the count
    old, new = bytes([0x2C, 0x15, 2 * values]), bytes([0x2C, 0x15, 2 * values - 2])
    at = content.index(old, place, place + 40)
    path.write_bytes(content[:at] + new + content[at + len(old) :])
    with pytest.raises(DataError, match="the pages of"):
        checked(path)
    with pytest.raises(DataError, match="rows of width 4"):
        list(stream_rows(path, 4, 2))
