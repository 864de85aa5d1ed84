"""What labels say, for each task: a class or a grade by its name, or several findings, each present, absent or unknown.

Findings come in three forms: a column (or array) for each, one text with the names of those that are present
(`Effusion|Mass`), or an array with a row of numbers for each record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, DataError
from common.names import TASKS, Task
from common.texts import neat
from embeddings.readers.classes import ArrayTexts, array_classes, class_list, short

Label = int | tuple[int, ...]

# The one table of what a cell of a finding may hold, in lower case. What is not here rejects its row: "none" and "-"
# could mean absent as well as unknown.
CELLS = {
    **dict.fromkeys(("1", "1.0", "yes", "y", "true", "present", "positive"), 1),
    **dict.fromkeys(("0", "0.0", "no", "n", "false", "absent", "negative"), 0),
    **dict.fromkeys(("", "-1", "-1.0", "u", "uncertain", "unknown", "?", "nan", "na", "n/a", "null", "<na>"), -1),
}
NO_FINDING = ("no finding", "no findings")  # alone in a text of names: every finding is absent
_SHOWN = 50
_EXPECTED = "expected 1 (present), 0 (absent), or nothing, -1 or u (unknown)"


@dataclasses.dataclass(frozen=True)
class LabelForm:
    """How a site's labels are written.

    `classes` are the names agreed in the federation, or None for those found. `findings` name the columns or arrays
    that hold one finding each; `separator` stands between the names of findings where one text holds them all.
    """

    task: Task = "multiclass"
    classes: tuple[str, ...] | None = None
    findings: tuple[str, ...] = ()
    separator: str = "|"


def label_form(task: str | None, classes: tuple[str, ...] | None, findings: str | None, separator: str) -> LabelForm:
    """The form that a command's options name.

    Raises:
        ConfigError: there is no such task, or the options contradict each other.
    """
    columns = () if findings is None else tuple(map(neat, findings.split(",")))
    known = {str(one): one for one in TASKS}
    named = ("multilabel" if columns else "multiclass") if task is None else task
    if named not in known:
        raise ConfigError(f"--task: expected {', '.join(known)}; found {named!r}")
    if columns and named != "multilabel":
        raise ConfigError(f"--findings name a column for each finding, of --task multilabel; found --task {named}")
    if columns and (len(set(columns)) < len(columns) or not all(columns)):
        raise ConfigError(f"--findings: expected different, non-empty names; found {findings}")
    if columns and classes is not None and len(classes) != len(columns):
        raise ConfigError(
            f"--classes: expected a name for each of the {len(columns)} columns of --findings, in their order, found "
            f"{len(classes)} names"
        )
    if not separator or separator == "?":
        raise ConfigError(f"--separator: expected what stands between findings, such as |; found {separator!r}")
    return LabelForm(known[named], classes, columns, separator)


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of classes, grades or findings, in the order of the labels.

    `number` turns what stands in a file into a label; it raises `DataError` where that names none of them.
    """

    names: tuple[str, ...]
    number: Callable[[str | tuple[int, ...]], Label]


def names_of(form: LabelForm, stated: Sequence[str | tuple[int, ...]]) -> Names:
    """The names that a site's labels have, and how to read one.

    Args:
        form: how they are written.
        stated: what stands in the file for each record: a text, or its findings where each has a column.

    Raises:
        ConfigError, DataError: as `class_list` and `check_grades`.
    """
    if form.findings:
        return Names(class_list(form.classes or form.findings, ()), _as_it_is)
    texts = [text for text in stated if isinstance(text, str)]
    if form.task == "multilabel":
        return _listed_names(form, texts)
    names = class_list(form.classes, texts)
    check_grades(form, names)
    index = {name: number for number, name in enumerate(names)}

    def number(text: str | tuple[int, ...]) -> Label:
        if text not in index:
            raise DataError(f"unknown label {text!r}; expected {short(names)}")
        return index[str(text)]

    return Names(names, number)


def check_grades(form: LabelForm, names: Sequence[str], *, stated: bool = False) -> None:
    """Refuse (DataError) grades whose order nobody has stated, here or in `form`; classes have none."""
    if form.task != "ordinal":
        return
    steps = np.diff([int(name) for name in names]) if all(name.isdecimal() for name in names) else np.zeros(1)
    if len(names) < 2 or (form.classes is None and not stated and not (steps == 1).all()):
        raise DataError(
            "grades: expected two or more, as whole numbers without a gap, or all of them in their order by --classes; "
            f"found {short(names)}"
        )


def cells_of(names: Sequence[str], cells: Sequence[str]) -> tuple[int, ...]:
    """The findings of a row with a cell for each: 1, 0 or -1 as `CELLS` has it; another cell is a DataError."""
    found = [CELLS.get(cell.casefold()) for cell in cells]
    for name, cell, value in zip(names, cells, found, strict=True):
        if value is None:
            raise DataError(f"{name} is {cell!r}; {_EXPECTED}")
    return tuple(value for value in found if value is not None)


@dataclasses.dataclass(frozen=True)
class ArrayLabels:
    """The labels of arrays: their names, each array's labels, and by row why one can't be read (its label is none)."""

    names: tuple[str, ...]
    labels: tuple[NDArray[Any], ...]
    rejected: tuple[dict[int, str], ...]


def array_labels(
    form: LabelForm, parts: Sequence[Sequence[ArrayTexts]], own: Sequence[str] | None = None, *, cells: bool = False
) -> ArrayLabels:
    """Read the labels of one or more arrays.

    Args:
        form: how they are written.
        parts: each array's columns: one text for each record, or of `cells` one for each finding.
        own: the archive's own list of names, or None.
        cells: whether each column holds one finding.

    Raises:
        ConfigError, DataError: as `names_of`, or nothing names the findings.
    """
    if form.task != "multilabel":
        names, numbers, expected = array_classes([columns[0] for columns in parts], form.classes, own)
        check_grades(form, names, stated=own is not None)
        notes = [
            {int(row): _none_of_them(column[row], expected) for row in np.flatnonzero(values < 0)}
            for (column, *_), values in zip(parts, numbers, strict=True)
        ]
        return ArrayLabels(names, tuple(numbers), tuple(notes))
    listed = form.classes if form.classes is not None else form.findings or own
    if not cells:
        form = dataclasses.replace(form, classes=None if listed is None else tuple(listed))
        known = names_of(form, [text for columns in parts for text in columns[0].texts])
        names, read = known.names, [_rows_of_texts(columns[0], known) for columns in parts]
    elif listed is None or {len(columns) for columns in parts} != {len(listed)}:
        raise DataError(
            f"labels: expected the names of {len(parts[0])} findings, in the order of the columns, by --classes or an "
            f"array class_names; found {'none' if listed is None else short(listed)}"
        )
    else:
        names = class_list(listed, ())
        read = [_rows_of_cells(columns, names) for columns in parts]
    return ArrayLabels(names, tuple(labels for labels, _ in read), tuple(why for _, why in read))


def _none_of_them(text: str, expected: str) -> str:
    return f"unknown label {text}; expected {expected}" if text else "no label"


def _rows_of_cells(columns: Sequence[ArrayTexts], names: Sequence[str]) -> tuple[NDArray[np.int8], dict[int, str]]:
    values = np.zeros((len(columns[0].places), len(columns)), dtype=np.int8)
    rejected: dict[int, str] = {}
    for number, (column, name) in enumerate(zip(columns, names, strict=True)):
        values[:, number] = column.per_row([CELLS.get(text.casefold(), 2) for text in column.texts])
        for row in np.flatnonzero(values[:, number] == 2).tolist():
            rejected.setdefault(row, f"{name} is {column[row]!r}; {_EXPECTED}")
    return values, rejected


def _rows_of_texts(column: ArrayTexts, known: Names) -> tuple[NDArray[np.int8], dict[int, str]]:
    read: list[Label] = []
    reasons: dict[int, str] = {}
    for number, text in enumerate(column.texts):
        try:
            read.append(known.number(text))
        except DataError as error:
            read.append((-1,) * len(known.names))
            reasons[number] = str(error)
    values = np.asarray(read, dtype=np.int8).reshape(-1, len(known.names))[column.places]
    return values, {row: reasons[place] for row, place in enumerate(column.places.tolist()) if place in reasons}


def _as_it_is(label: str | tuple[int, ...]) -> Label:
    if isinstance(label, str):
        raise DataError(f"expected a cell for each finding, found {label!r}")
    return label


def _listed_names(form: LabelForm, texts: Sequence[str]) -> Names:
    @cache
    def parts(text: str) -> tuple[str, ...]:
        return tuple(part for part in map(neat, text.split(form.separator)) if part)

    if form.classes is None:
        found = {neat(part.removesuffix("?")) for text in set(texts) for part in parts(text)}
        here = sorted(name for name in found if name and name.casefold() not in NO_FINDING)
        raise DataError(
            "expected the findings that this site labels by --classes, as a list that does not depend on who has one: "
            f"their names leave the site when it meets others. Found in the labels: {', '.join(here[:_SHOWN])}"
        )
    names = class_list(form.classes, ())
    index = {name: number for number, name in enumerate(names)}

    @cache
    def number(text: str | tuple[int, ...]) -> Label:
        values, nothing = [0] * len(names), False
        for part in parts(str(text)):
            name = part if part in index else neat(part.removesuffix("?"))
            if name in index:
                value = 1 if name == part else -1
                if values[index[name]] not in (0, value):
                    raise DataError(f"{text!r} names {name} as present and as unknown")
                values[index[name]] = value
            elif part.casefold() in NO_FINDING:
                nothing = True
            else:
                raise DataError(f"unknown finding {part!r}; expected {short(names)}, or No Finding")
        if not any(values) and not nothing:
            raise DataError(f"no finding in {text!r}; where there is none expected No Finding")
        if nothing and 1 in values:
            raise DataError(f"{text!r} names a finding beside No Finding")
        return tuple(values)

    return Names(names, number)
