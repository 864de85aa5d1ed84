"""Read embeddings that somebody made already: arrays of an `.npz`, or columns of a parquet file."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.names import Task
from common.wire.identity import EncoderIdentity
from embeddings.readers.classes import ArrayTexts, array_texts
from embeddings.readers.columns import Archive, Columns
from embeddings.readers.findings import ArrayLabels, LabelForm, array_labels
from embeddings.readers.labels import check_columns
from embeddings.readers.patients import patient_identifier, patient_number
from embeddings.store.sets import EmbeddingSet, SetMetadata
from embeddings.store.writing import write_chunks

_TEXTS, _FINDINGS = "iuUS", "iuUSbf"  # numpy's kinds of what a label, and a finding, may be


@dataclasses.dataclass(frozen=True)
class ReadyNames:
    """Names of the arrays or columns of ready embeddings; `patients` and `columns` are optional."""

    embeddings: str = "embeddings"
    labels: str = "labels"
    class_names: str = "class_names"
    patients: str | None = None
    columns: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ready:
    """Embeddings made elsewhere: mapped rows, those to keep, and what the others lack."""

    embeddings: NDArray[Any]
    labels: NDArray[Any]
    task: Task
    kept: NDArray[np.int64]
    patients: ArrayTexts | None
    columns: dict[str, NDArray[np.str_]]
    class_names: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]

    def chunks(
        self, identity: EncoderIdentity, patient_numbers: NDArray[np.int64] | None, size: int = 4096
    ) -> Iterator[EmbeddingSet]:
        """Yield the kept rows as sets of at most `size` rows; `patient_numbers` (n,) of all rows, or None."""
        for start in range(0, self.kept.size, size):
            rows = self.kept[start : start + size]
            yield EmbeddingSet(
                embeddings=np.asarray(self.embeddings[rows], dtype=np.float32),
                labels=self.labels[rows],
                metadata=SetMetadata(identity, task=self.task),
                groups=None if patient_numbers is None else patient_numbers[rows],
                columns={name: values[rows] for name, values in self.columns.items()},
            )


def read_ready(path: Path, work: Path, names: ReadyNames, form: LabelForm) -> Ready:
    """Read ready embeddings.

    Args:
        path: `.npz` or parquet with `embeddings` (n, d) of floats and `labels`: (n,) numbers or names of classes or
            grades, (n, K) findings, or (n,) texts that name findings.
        work: folder to unpack the embeddings into.
        names: what the arrays or columns are called.
        form: what the labels are; without names agreed, those of the archive's own list, or the labels found.

    Returns:
        The rows; those that are not finite, or whose label can't be read, are in `rejected`.

    Raises:
        DataError: an array is missing, damaged, or of the wrong shape or type.
    """
    source = Columns(path, work) if path.suffix.lower() == ".parquet" else Archive(path, work)
    embeddings = source.read(names.embeddings)
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or 0 in embeddings.shape:
        raise DataError(
            f"{path}: expected {names.embeddings} as (n, d) floats, found {embeddings.shape} {embeddings.dtype}"
        )
    check_columns(names.columns)
    found = _labels(source, names, form, len(embeddings))
    fine = np.ones(len(embeddings), dtype=bool)
    fine[list(found.rejected[0])] = False
    rejected = [(_where(path, row), why) for row, why in found.rejected[0].items()]
    patients = None if names.patients is None else _column(source, names.patients, len(embeddings))
    if patients is not None:
        stated, patients = patients, dataclasses.replace(patients, texts=tuple(map(patient_identifier, patients.texts)))
        nameless = np.flatnonzero(fine & (patients.per_row(patients.texts) == ""))
        rejected += [(_where(path, row), f"{stated[row]!r} names no patient") for row in nameless]
        fine[nameless] = False
    for start in range(0, len(embeddings), 4096):
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is rejected
            block = np.asarray(embeddings[start : start + 4096], dtype=np.float32)
        usable = np.isfinite(block).all(axis=1) & block.any(axis=1)
        bad = np.flatnonzero(~usable & fine[start : start + 4096]) + start
        rejected += [(_where(path, row), "values that are not finite, or all zero") for row in bad]
        fine[bad] = False
    further = {name: _column(source, name, len(embeddings)) for name in names.columns}
    texts = {name: column.per_row(column.texts) for name, column in further.items()}
    kept = np.flatnonzero(fine)
    return Ready(embeddings, found.labels[0], form.task, kept, patients, texts, found.names, tuple(sorted(rejected)))


def _labels(source: Archive | Columns, names: ReadyNames, form: LabelForm, rows: int) -> ArrayLabels:
    own = None
    if isinstance(source, Archive) and source.has(names.class_names):  # a column of a table is no list
        listed = _column(source, names.class_names, None)
        own = [listed[row] for row in range(len(listed.places))]
    if form.findings:
        columns = [_column(source, name, rows, findings=True) for name in form.findings]
        return array_labels(form, [columns], own, cells=True)
    values = source.read(names.labels)
    if form.task == "multilabel" and values.ndim == 2 and values.shape[1] > 0:
        columns = [_texts(source, names.labels, column, rows, _FINDINGS) for column in values.T]
        return array_labels(form, [columns], own, cells=True)
    return array_labels(form, [[_column(source, names.labels, rows)]], own)


def _column(source: Archive | Columns, name: str, rows: int | None, *, findings: bool = False) -> ArrayTexts:
    values = source.read(name)
    return _texts(source, name, values.reshape(-1), rows, _FINDINGS if findings else _TEXTS)


def _texts(source: Archive | Columns, name: str, values: NDArray[Any], rows: int | None, kinds: str) -> ArrayTexts:
    rows = values.size if rows is None else rows
    if values.shape != (rows,) or values.dtype.kind not in kinds:
        raise DataError(
            f"{source.path}: expected {name} as {rows} whole numbers or texts (with --task multilabel also a row of "
            f"findings each), found {values.shape} {values.dtype}"
        )
    return array_texts(f"{source.path}: the array {name}", values)


def _where(path: Path, row: object) -> str:
    return f"{path.name}[{row}]"


def import_ready(
    path: Path,
    out: Path,
    names: ReadyNames,
    form: LabelForm,
    declared: EncoderIdentity,
    salt: bytes,
    precision: str,
) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Write a store of ready embeddings.

    Args:
        path: the archive or parquet file.
        out: the store.
        names: what the arrays are called.
        form: what the labels are.
        declared: what the site says of the encoder; width and classes are filled in.
        salt: of the site; hashes patients.
        precision: of the stored embeddings.

    Returns:
        Rows written, and the rejected (source, reason).

    Raises:
        DataError: as `read_ready`, or no row is left, or the disk is full.
    """
    if path.suffix.lower() not in (".npz", ".parquet") or not path.is_file():
        raise DataError(f"{path}: expected an .npz archive or a parquet file of ready embeddings")
    work = out.with_name(f".{out.name}.work")
    try:
        ready = read_ready(path, work, names, form)
        identity = dataclasses.replace(
            declared, dimension=int(ready.embeddings.shape[1]), class_names=ready.class_names
        )
        numbers = None
        if ready.patients is not None:
            numbers = ready.patients.per_row([patient_number(salt, text) for text in ready.patients.texts])
        if not ready.kept.size:
            source, reason = ready.rejected[0]
            raise DataError(f"{path}: none of {len(ready.rejected)} rows can be used; the first: {source}: {reason}")
        metadata = SetMetadata(identity, task=ready.task)
        write_chunks(out, lambda: ready.chunks(identity, numbers), metadata, precision=precision)
        return int(ready.kept.size), ready.rejected
    finally:
        shutil.rmtree(work, ignore_errors=True)
