"""The label file of a site: a CSV with the path, the label and, if wanted, patient and further columns."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError, DataError
from common.texts import neat, open_text, trimmed
from embeddings.limits import LABEL_FILE_BYTES, LABEL_ROWS, MAX_TEXT
from embeddings.readers.findings import cells_of
from embeddings.readers.patients import patient_identifier
from embeddings.store.sets import RESERVED

_LONGEST_LINE = 1_000_000
_QUOTED = re.compile('"[^"]*"')


@dataclasses.dataclass(frozen=True)
class LabelColumns:
    """Names of the columns to read: `label`, or in its place `findings` with one each.

    `path_suffix` is put after each path (a file of ids without `.jpg`).
    """

    path: str = "path"
    label: str = "label"
    patient: str | None = None
    extra: tuple[str, ...] = ()
    path_suffix: str = ""
    findings: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns that hold the label."""
        return self.findings or (self.label,)


@dataclasses.dataclass(frozen=True)
class LabelRow:
    """One row: path, label (a text, or findings as 1, 0, -1), patient or None, and the extra columns."""

    path: str
    label: str | tuple[int, ...]
    patient: str | None
    extra: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """Rows by path; `rejected` paths with the reason; `repeated` rows that agree with an earlier one."""

    rows: dict[str, LabelRow]
    rejected: dict[str, str]
    repeated: int
    has_patients: bool


def read_labels(path: Path, columns: LabelColumns, *, patients: bool = True) -> LabelTable:
    """Read a label file.

    Args:
        path: CSV in UTF-8 with a header line; comma, semicolon or tab between cells.
        columns: which columns hold what. Without a patient column named, one called `patient` is taken if it
            is there.
        patients: whether patients are looked at.

    Returns:
        The rows by path. A path with an empty label, a cell that is no finding, or two rows that differ, is in
        `rejected`.

    Raises:
        DataError: the file is missing, empty, no text, or lacks a column or has it twice.
        ConfigError: the extra columns are named twice, or like a column of a store.
    """
    try:
        with open_text(path, DataError, newline="") as file:
            if os.fstat(file.fileno()).st_size > LABEL_FILE_BYTES:
                raise DataError(f"{path}: expected a label file of at most {LABEL_FILE_BYTES:,} bytes; divide it")
            first = file.readline(_LONGEST_LINE)
            if "\0" in first:
                raise DataError(
                    f"{path}: expected text in UTF-8, found NUL characters (is it UTF-16?): save it as UTF-8"
                )
            delimiter = max(",;\t", key=_QUOTED.sub("", first).count)
            names = [neat(name) for name in next(csv.reader([first], delimiter=delimiter), [])]
            chosen = _chosen(path, names, columns)
            chosen = chosen if patients else dataclasses.replace(chosen, patient=None)
            table = LabelTable({}, {}, 0, chosen.patient is not None)
            repeated = 0
            for number, cells in enumerate(csv.reader(file, delimiter=delimiter), start=2):
                if number > LABEL_ROWS:
                    raise DataError(f"{path}: expected at most {LABEL_ROWS:,} rows, found more; divide it")
                if any(map(neat, cells)):  # programs that save sheets leave rows of empty cells at the end
                    repeated += _add(table, number, names, cells, chosen)
    except OSError as error:
        raise DataError(f"{path}: can't read the label file ({error.strerror})") from None
    except csv.Error as error:
        raise DataError(f"{path}: expected a CSV file; it can't be read ({error})") from None
    if not table.rows and not table.rejected:
        raise DataError(f"{path}: expected at least one row under the header, found none")
    return dataclasses.replace(table, repeated=repeated)


def check_columns(names: Sequence[str]) -> None:
    """Refuse further columns (ConfigError) that are named twice, or like a column that every store may have."""
    if len(set(names)) < len(names) or set(names) & set(RESERVED):
        raise ConfigError(
            f"further columns: expected different names, none of {', '.join(RESERVED)}; found {', '.join(names)}"
        )


def _chosen(path: Path, names: list[str], columns: LabelColumns) -> LabelColumns:
    columns = dataclasses.replace(
        columns,
        path=neat(columns.path),
        label=neat(columns.label),
        findings=tuple(map(neat, columns.findings)),
        patient=None if columns.patient is None else neat(columns.patient),
        extra=tuple(map(neat, columns.extra)),
    )
    if columns.patient is None and "patient" in names:
        columns = dataclasses.replace(columns, patient="patient")
    check_columns(columns.extra)
    wanted = [columns.path, *columns.labels, *columns.extra]
    wanted += [] if columns.patient is None else [columns.patient]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(
            f"{path}: expected the columns {', '.join(wanted)}; missing: {', '.join(missing)}; found: "
            f"{', '.join(names) or 'none'} (name them with --path-column, --label-column or --findings, "
            "--patient-column)"
        )
    twice = sorted({name for name in wanted if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {twice[0]} comes twice in the header: rename or remove one of them")
    return columns


def _add(table: LabelTable, number: int, names: list[str], cells: list[str], columns: LabelColumns) -> int:
    """Put one line into the table; returns 1 when it repeats an earlier line, else 0."""
    values = {name: neat(cell) for name, cell in zip(names, cells, strict=False)}
    raw = trimmed(dict(zip(names, cells, strict=False)).get(columns.path, ""))  # as the file's name is written
    key = raw + columns.path_suffix if raw else f"<line {number}>"
    patient = None if columns.patient is None else values.get(columns.patient, "")
    stated = [values.get(name, "") for name in columns.labels]
    row = LabelRow(key, stated[0], patient, tuple(values.get(name, "") for name in columns.extra))
    wrong = ""
    if columns.findings:
        try:
            row = dataclasses.replace(row, label=cells_of(columns.findings, stated))
        except DataError as error:
            wrong = str(error)
    if not raw:
        table.rejected[key] = "the label file has no path in this line"
    elif len(cells) != len(names):
        table.rejected[key] = f"the label file has {len(cells)} cells in line {number}, expected {len(names)}"
    elif any(len(cell) > MAX_TEXT for cell in cells):
        table.rejected[key] = f"the label file has a cell of more than {MAX_TEXT:,} characters in line {number}"
    elif "\0" in "".join(cells):
        table.rejected[key] = f"the label file has a NUL character in line {number}"
    elif "\n" in "".join([*stated, patient or "", *row.extra]):
        table.rejected[key] = f"the label file has a cell of several lines in line {number}: is a quote left open?"
    elif wrong:
        table.rejected[key] = f"{wrong}, in line {number}"
    elif not row.label:
        table.rejected[key] = f"the label file has no label in line {number}"
    elif patient is not None and not patient_identifier(patient):
        shown = f"{patient!r}, which names nobody," if patient else "nothing"
        table.rejected[key] = f"the label file has {shown} as the patient in line {number}"
    elif key in table.rows and table.rows[key] != row:
        table.rejected[key] = f"the label file has two rows that differ (the second in line {number})"
    elif key in table.rows:
        return 1
    else:
        table.rows[key] = row
    if key in table.rejected:
        table.rows.pop(key, None)
    return 0
