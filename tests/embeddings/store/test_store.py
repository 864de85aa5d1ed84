from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import DataError
from common.wire.identity import EncoderIdentity
from embeddings.store.file import iterate_store, read_metadata, read_store, read_usable, stored_precision
from embeddings.store.sets import EmbeddingSet, SetMetadata, regroup
from embeddings.store.writing import write_chunks, write_store

IDENTITY = EncoderIdentity("enc", "r1", 5, "none", "0" * 64, "float32", ("a", "b", "c"))


def _set(rows: int = 40, rng: np.random.Generator | None = None) -> EmbeddingSet:
    draw = np.random.default_rng(3) if rng is None else rng
    return EmbeddingSet(
        embeddings=draw.standard_normal((rows, 5)).astype(np.float32),
        labels=draw.integers(0, 3, rows),
        metadata=SetMetadata(IDENTITY, notes={"source": "drawn"}),
        groups=draw.integers(-(2**62), 2**62, rows),
        splits=np.asarray(["train", "validation", "test"])[draw.integers(0, 3, rows)],
        columns={"site": np.asarray([f"s{number % 4}" for number in range(rows)])},
        keys=draw.integers(0, 256, (rows, 16), dtype=np.uint8),
    )


def _rows(data: EmbeddingSet) -> list[object]:
    return [data.embeddings, data.labels, data.groups, data.splits, data.columns["site"], data.keys]


def test_write_store_round_trip_keeps_every_column(tmp_path: Path) -> None:
    data = _set()
    fingerprint = write_store(tmp_path / "a.parquet", data)
    read = read_store(tmp_path / "a.parquet")
    for before, after in zip(_rows(data), _rows(read), strict=True):
        np.testing.assert_array_equal(before, after)
    assert read.embeddings.dtype == np.float32
    assert read.labels.dtype == np.int64
    assert read.metadata.identity == IDENTITY
    assert read.metadata.fingerprint == fingerprint
    assert read.metadata.class_counts == tuple(np.bincount(data.labels, minlength=3))
    assert read.metadata.notes == {"source": "drawn"}
    assert read.num_classes == 3
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert schema.field("embedding").type == pa.list_(pa.float32(), 5)


def test_write_store_float16_halves_and_rounds(tmp_path: Path) -> None:
    data = _set()
    write_store(tmp_path / "a.parquet", data, precision="float16")
    assert stored_precision(tmp_path / "a.parquet") == "float16"
    np.testing.assert_array_equal(
        read_store(tmp_path / "a.parquet").embeddings, data.embeddings.astype(np.float16).astype(np.float32)
    )


def test_write_store_float16_overflow_is_refused(tmp_path: Path) -> None:
    data = _set()
    data.embeddings[7, 2] = 1e6
    with pytest.raises(DataError, match="row 7"), np.errstate(over="ignore"):
        write_store(tmp_path / "a.parquet", data, precision="float16")
    assert list(tmp_path.iterdir()) == []


def test_write_chunks_bytes_do_not_depend_on_how_rows_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    data = _set(100)
    write_store(tmp_path / "whole.parquet", data)
    for size in (1, 7, 64):
        write_chunks(tmp_path / "cut.parquet", lambda size=size: regroup([data], size), data.metadata)
        assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert read_metadata(tmp_path / "cut.parquet").created == "2023-11-14T22:13:20+00:00"


def test_fingerprint_changes_with_any_value(tmp_path: Path) -> None:
    data = _set()
    seen = {write_store(tmp_path / "a.parquet", data)}
    changed = [
        dataclasses.replace(data, embeddings=data.embeddings + np.eye(40, 5, dtype=np.float32)),
        dataclasses.replace(data, labels=np.roll(data.labels, 1)),
        dataclasses.replace(data, groups=data.groups + 1),
        dataclasses.replace(data, splits=np.roll(data.splits, 1)),
        dataclasses.replace(data, columns={"site": np.roll(data.columns["site"], 1)}),
        dataclasses.replace(data, metadata=SetMetadata(dataclasses.replace(IDENTITY, revision="r2"))),
    ]
    for other in changed:
        seen.add(write_store(tmp_path / "a.parquet", other))
    assert len(seen) == len(changed) + 1


def test_regroup_gives_equal_chunks_in_order() -> None:
    data = _set(23)
    chunks = list(regroup(regroup([data], 4), 10))
    assert [len(chunk) for chunk in chunks] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate([chunk.keys for chunk in chunks]), data.keys)


def test_read_store_names_rows_that_are_not_finite(tmp_path: Path) -> None:
    data = _set()
    bad = data.embeddings.copy()
    bad[[3, 11], 0] = [np.nan, np.inf]
    _write_raw(tmp_path / "a.parquet", data, embeddings=bad)
    with pytest.raises(DataError, match=r"2 rows hold values that are not finite .* row 3, 11 \(from 0\)"):
        read_store(tmp_path / "a.parquet")


def test_read_store_names_labels_outside_the_classes(tmp_path: Path) -> None:
    data = _set()
    labels = data.labels.copy()
    labels[5] = 3
    _write_raw(tmp_path / "a.parquet", data, labels=labels)
    with pytest.raises(DataError, match=r"1 labels lie outside the 3 classes \(expected 0..2\): row 5 has 3"):
        read_store(tmp_path / "a.parquet")


def test_read_store_refuses_an_empty_store(tmp_path: Path) -> None:
    data = _set()
    _write_raw(tmp_path / "a.parquet", data, embeddings=data.embeddings[:0], labels=data.labels[:0])
    with pytest.raises(DataError, match="at least one record"):
        read_store(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="at least one record"):
        write_store(tmp_path / "b.parquet", data.take(np.zeros(0, dtype=np.int64)))


def test_read_store_finds_a_changed_value(tmp_path: Path) -> None:
    data = _set()
    changed = data.embeddings.copy()
    changed[0, 0] += 1e-3
    _write_raw(tmp_path / "a.parquet", data, embeddings=changed)
    with pytest.raises(DataError, match="does not match its fingerprint"):
        read_store(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1" + bytes(50) + b"PAR1"])
def test_read_store_refuses_files_that_are_no_store(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match="expected an embedding store"):
        read_store(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no such file"):
        read_store(tmp_path / "b.parquet")


def test_read_store_refuses_a_parquet_file_of_somebody_else(tmp_path: Path) -> None:
    pq.write_table(pa.table({"embedding": [[1.0]], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="metadata is missing"):
        read_store(tmp_path / "a.parquet")


def test_read_store_refuses_another_format(tmp_path: Path) -> None:
    write_store(tmp_path / "a.parquet", _set())
    table = pq.read_table(tmp_path / "a.parquet")
    text = table.schema.metadata[b"fedhypevae"].replace(b"fedhypevae-embeddings/1", b"fedhypevae-embeddings/9")
    pq.write_table(table.replace_schema_metadata({b"fedhypevae": text}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="found fedhypevae-embeddings/9"):
        read_store(tmp_path / "b.parquet")


def test_write_store_leaves_the_old_file_when_the_disk_is_full(tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk: the system call fails in the same place."""
    path = tmp_path / "a.parquet"
    write_store(path, _set())
    before = path.read_bytes()
    code = f"""
import resource, signal, sys
from pathlib import Path
import numpy as np
from common.errors import DataError
from embeddings.store.file import read_store
from embeddings.store.writing import write_store
data = read_store(Path({str(path)!r}))
rows = np.tile(np.arange(len(data)), 2000)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_store(Path({str(path)!r}), data.take(rows))
except DataError as error:
    print(error)
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "nothing was replaced" in done.stdout
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


FINDINGS = SetMetadata(IDENTITY, task="multilabel")


def _findings(rows: int = 40) -> EmbeddingSet:
    labels = np.random.default_rng(4).integers(-1, 2, (rows, 3)).astype(np.int8)
    return dataclasses.replace(_set(rows), labels=labels, metadata=FINDINGS)


def test_findings_are_written_as_a_list_of_int8_and_read_back(tmp_path: Path) -> None:
    data = _findings()
    fingerprint = write_store(tmp_path / "a.parquet", data)
    assert pq.read_schema(tmp_path / "a.parquet").field("label").type == pa.list_(pa.int8(), 3)
    read = read_store(tmp_path / "a.parquet")
    for before, after in zip(_rows(data), _rows(read), strict=True):
        np.testing.assert_array_equal(before, after)
    assert (read.metadata.task, read.labels.dtype, read.metadata.fingerprint) == ("multilabel", np.int8, fingerprint)
    assert read.metadata.class_counts == tuple((data.labels == 1).sum(axis=0))  # records that have the finding
    chunks = [part.labels for part in iterate_store(tmp_path / "a.parquet")]
    np.testing.assert_array_equal(np.concatenate(chunks), data.labels)
    np.testing.assert_array_equal(read_usable(tmp_path / "a.parquet").labels, data.labels)
    changed = dataclasses.replace(data, labels=np.where(np.eye(40, 3) == 1, -data.labels, data.labels).astype(np.int8))
    assert write_store(tmp_path / "b.parquet", changed) != fingerprint


def test_findings_are_taken_cut_and_joined_by_row() -> None:
    data = _findings()
    rows = np.asarray([3, 1, 4])
    taken = data.take(rows)
    np.testing.assert_array_equal(taken.labels, data.labels[rows])
    assert taken.metadata.class_counts == tuple((data.labels[rows] == 1).sum(axis=0))
    np.testing.assert_array_equal(np.concatenate([part.labels for part in regroup(regroup([data], 7), 9)]), data.labels)
    assert data.split("test").labels.shape == ((data.splits == "test").sum(), 3)


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros(40, np.int8),
        np.zeros((40, 2), np.int8),
        np.zeros((40, 3), np.int64),
        np.zeros((40, 3, 1), np.int8),
    ],
)
def test_findings_of_another_shape_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"expected labels of a multilabel task as int8 of shape \(40, 3\), found"):
        write_store(tmp_path / "a.parquet", dataclasses.replace(_findings(), labels=labels))


def test_classes_as_findings_are_refused(tmp_path: Path) -> None:
    data = dataclasses.replace(_findings(), metadata=SetMetadata(IDENTITY))
    with pytest.raises(DataError, match="expected labels of a multiclass task as int64"):
        write_store(tmp_path / "a.parquet", data)
    with pytest.raises(DataError, match="expected labels of a multilabel task, found multiclass"):
        write_chunks(tmp_path / "a.parquet", lambda: iter([_set()]), FINDINGS)


@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_findings_that_are_none_are_refused_by_row_and_left_out_by_a_run(tmp_path: Path, value: int) -> None:
    data = _findings()
    labels = data.labels.copy()
    labels[[5, 7], 1] = value
    with pytest.raises(DataError, match=r"2 rows have a finding that is not 1 .*: row 5, 7"):
        write_store(tmp_path / "a.parquet", dataclasses.replace(data, labels=labels))
    _rewrite(tmp_path / "a.parquet", data, pa.array(labels.tolist(), pa.list_(pa.int8(), 3)))
    with pytest.raises(DataError, match=r"2 rows have a finding that is not 1 .*: row 5, 7"):
        read_store(tmp_path / "a.parquet")
    np.testing.assert_array_equal(read_usable(tmp_path / "a.parquet").labels, np.delete(labels, [5, 7], axis=0))


def test_findings_with_a_gap_are_refused(tmp_path: Path) -> None:
    data = _findings()
    rows = [[None, *row[1:]] if number == 9 else row for number, row in enumerate(data.labels.tolist())]
    _rewrite(tmp_path / "a.parquet", data, pa.array(rows, pa.list_(pa.int8(), 3)))
    with pytest.raises(DataError, match="column label has empty values within its rows"):
        read_store(tmp_path / "a.parquet")


def test_findings_with_gaps_are_refused_and_left_out_by_a_run(tmp_path: Path) -> None:
    data = _findings()
    rows: list[list[int | None] | None] = data.labels.tolist()
    rows[2], rows[9] = None, [0, None, 1]
    kind = pa.list_(pa.int8(), 3)
    _rewrite(tmp_path / "a.parquet", data, pa.array(rows, kind))
    with pytest.raises(DataError, match="column label: expected 120 values, its pages hold 118"):
        read_store(tmp_path / "a.parquet")
    np.testing.assert_array_equal(read_usable(tmp_path / "a.parquet").labels, np.delete(data.labels, [2, 9], axis=0))


@pytest.mark.parametrize("kind", [pa.list_(pa.int8(), 4), pa.list_(pa.int16(), 3), pa.list_(pa.int8()), pa.int64()])
def test_findings_of_another_kind_are_refused(tmp_path: Path, kind: pa.DataType) -> None:
    row = 0 if kind == pa.int64() else [0] * (4 if kind == pa.list_(pa.int8(), 4) else 3)
    labels = pa.array([row] * 40, kind)
    _rewrite(tmp_path / "a.parquet", _findings(), labels)
    for read in (read_store, read_usable, read_metadata):
        with pytest.raises(DataError, match="expected the column label as fixed_size_list"):
            read(tmp_path / "a.parquet")


def test_store_without_a_task_has_classes_and_its_old_fingerprint(tmp_path: Path) -> None:
    fingerprint = write_store(tmp_path / "a.parquet", _set())
    table = pq.read_table(tmp_path / "a.parquet")
    about = json.loads(table.schema.metadata[b"fedhypevae"])
    assert about.pop("task") == "multiclass"
    pq.write_table(table.replace_schema_metadata({b"fedhypevae": json.dumps(about)}), tmp_path / "old.parquet")
    read = read_store(tmp_path / "old.parquet")
    assert (read.metadata.task, read.metadata.fingerprint) == ("multiclass", fingerprint)
    for task in ("ordinal", "multilabel", "regression", 1, None):
        text = json.dumps({**about, "task": task})
        pq.write_table(table.replace_schema_metadata({b"fedhypevae": text}), tmp_path / "other.parquet")
        with pytest.raises(DataError, match=r"fingerprint|column label|expected a task|can't be read"):
            read_store(tmp_path / "other.parquet")


def test_grades_are_whole_numbers_with_a_task_of_their_own(tmp_path: Path) -> None:
    data = dataclasses.replace(_set(), metadata=SetMetadata(IDENTITY, task="ordinal"))
    write_store(tmp_path / "a.parquet", data)
    read = read_store(tmp_path / "a.parquet")
    np.testing.assert_array_equal(read.labels, data.labels)
    assert read.metadata.task == "ordinal"
    assert read.metadata.class_counts == tuple(np.bincount(data.labels, minlength=3))


def _rewrite(path: Path, data: EmbeddingSet, labels: pa.Array) -> None:
    """A store of the set with other labels, under the metadata of the right ones."""
    write_store(path, data)
    table = pq.read_table(path)
    position = table.schema.get_field_index("label")
    pq.write_table(table.set_column(position, pa.field("label", labels.type), labels), path)


def test_store_imports_without_torch() -> None:
    code = "import sys, embeddings.store.file; sys.exit(not {'torch', 'transformers', 'PIL'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_embedding_set_split_and_take() -> None:
    data = _set()
    parts = [data.split(name) for name in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(data)
    assert (parts[2].splits == "test").all()
    assert sum(parts[0].metadata.class_counts) == len(parts[0])
    with pytest.raises(DataError, match="'dev'"):
        data.split("dev")
    with pytest.raises(DataError, match="no `split` column"):
        dataclasses.replace(data, splits=None).split("train")


def test_iterate_store_yields_all_rows(tmp_path: Path) -> None:
    data = _set(9_000)
    write_store(tmp_path / "a.parquet", data)
    chunks = list(iterate_store(tmp_path / "a.parquet"))
    assert len(chunks) > 1
    np.testing.assert_array_equal(np.concatenate([chunk.embeddings for chunk in chunks]), data.embeddings)


def _write_raw(path: Path, data: EmbeddingSet, **changed: np.ndarray) -> None:
    """Write values past the checks, under the metadata of the right ones."""
    good = path.with_suffix(".good")
    plain = EmbeddingSet(data.embeddings, data.labels, data.metadata)
    write_store(good, plain)
    embeddings = changed.get("embeddings", data.embeddings)
    labels = changed.get("labels", data.labels)
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), 5), pa.array(labels)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=pq.read_schema(good)), path)
    good.unlink()
