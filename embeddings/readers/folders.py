"""List the images of a site with their labels: folders, CSV files, DICOM files and series.

Listing reads names, label rows and DICOM headers, no pixels. What can't be used is listed with the reason; it
never stops the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal

from common.errors import ConfigError, DataError
from common.texts import is_text, neat
from embeddings.pipeline import Item, Listing
from embeddings.readers.dicom import is_dicom, read_frame, read_header
from embeddings.readers.dicom_order import NO_PLACE, Slice, in_order
from embeddings.readers.dicom_picture import Window
from embeddings.readers.findings import Label, LabelForm, names_of
from embeddings.readers.images import SUFFIXES, read_image
from embeddings.readers.labels import LabelColumns, LabelRow, read_labels
from embeddings.readers.patients import patient_identifier
from embeddings.readers.walk import by_composed_name, composed, exists, inside, walk

Slices = Literal["all", "middle"]
_NAMELESS = "the patient is not known, as those of most others are; give a patient column, or use --no-patients"
_NOBODY = "is stated as the patient, which names nobody; give a patient column, or use --no-patients"

_NO_FILE = "no file of its own (a link to nothing, or a pipe); leave it out"
_ABSENT = "no such file; correct the label file"
_ALIKE = "several files have this name but for how its accents are stored; rename them"


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """How to read a folder. `form`: what its labels are; `patients` off: no identifiers."""

    columns: LabelColumns = dataclasses.field(default_factory=LabelColumns)
    form: LabelForm = dataclasses.field(default_factory=LabelForm)
    slices: Slices = "all"
    window: Window | None = None
    patients: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """One picture before its label is checked. `stated` is what stands where the `patient` should."""

    path: Path
    name: str
    frame: int | None
    row: LabelRow
    stated: str
    patient: str
    series: str
    place: Slice


def list_folder(
    root: Path,
    labels: Path | None,
    options: FolderOptions,
    advance: Callable[[int], None] = lambda amount: None,
) -> Listing:
    """List a folder of images: with a label file, or with one sub-folder per class.

    Args:
        root: the folder; nothing outside it is read.
        labels: the label file, whose paths are relative to `root`; a path may name a folder (a DICOM series).
            None takes the names of the sub-folders as classes.
        options: columns, classes, slices and window.
        advance: called for each file looked at.

    Returns:
        The listing, sorted by path.

    Raises:
        DataError: the folder or label file can't be used as a whole, or patients are known for some images
            only.
        ConfigError: the class list is wrong, or DICOM files are met without pydicom.
    """
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder of images, found none")
    base = root.resolve()
    rejected: dict[str, str] = {}
    remarks: list[str] = []
    window = options.window
    if labels is None:
        if options.form.findings:
            raise ConfigError("--findings name columns of a label file: give it with --labels")
        wanted = _by_folder(base, rejected)
    else:
        columns = dataclasses.replace(options.columns, findings=options.form.findings)
        table = read_labels(labels, columns, patients=options.patients)
        rejected.update(table.rejected)
        if table.repeated:
            remarks.append(f"{labels.name}: {table.repeated} rows repeat an earlier one and count once")
        wanted = _by_rows(base, table.rows, rejected)
    found: list[_Found] = []
    for path in sorted(wanted):
        advance(1)
        try:
            found += _pictures(path, path.relative_to(base).as_posix(), wanted[path], options)
        except DataError as error:
            rejected[path.relative_to(base).as_posix()] = str(error)
    if options.slices == "middle":
        found = _middle_of_series(found)
    known = names_of(options.form, [one.row.label for one in found])
    patients = options.patients and _has_patients(root, found)
    if patients:
        nameless = [one for one in found if not one.patient]
        rejected.update({_source(one): f"{one.stated!r} {_NOBODY}" if one.stated else _NAMELESS for one in nameless})
        found = [one for one in found if one.patient]
    elif options.patients and (nobody := [one.stated for one in found if one.stated]):
        remarks.append(f"no patient is known: {nobody[0]!r} {_NOBODY} ({len(nobody)} images)")
    items = []
    for one in found:
        try:
            label = known.number(one.row.label)
        except DataError as error:
            rejected[_source(one)] = str(error)
        else:
            items.append(_item(one, label, patients, window))
    return Listing(
        items=tuple(items),
        rejected=tuple(sorted(rejected.items())),
        class_names=known.names,
        column_names=options.columns.extra if labels is not None else (),
        remarks=tuple(remarks),
        rendering="" if window is None else f"dicom window {window.center:g},{window.width:g}; ",
        task=options.form.task,
    )


def items_of_file(base: Path, path: Path, options: FolderOptions) -> list[Item]:
    """The pictures of one file below a folder, whatever their labels; raises `DataError` where it holds none."""
    name = path.relative_to(base).as_posix()
    found = _pictures(path, name, LabelRow(name, "", None, ()), options)
    return [_item(one, 0, False, options.window) for one in found]


def _by_folder(base: Path, rejected: dict[str, str]) -> dict[Path, LabelRow]:
    wanted: dict[Path, LabelRow] = {}
    for path in walk(base):
        name = path.relative_to(base).as_posix()
        parts = name.split("/")
        if inside(base, path) is None:
            rejected[name] = "the file lies outside the folder (a link); copy it into the folder"
        elif len(parts) > 1:
            label = neat(parts[0])
            if label and is_text(label):
                wanted[path] = LabelRow(name, label, None, ())
            else:
                rejected[name] = "the name of its folder is blank or not in UTF-8, and can be no class: rename it"
        elif path.suffix.lower() in SUFFIXES or is_dicom(path):
            rejected[name] = "lies in no class folder; move it into one, or give a label file (--labels)"
    if not wanted:
        why = "".join(f"; {name}: {reason}" for name, reason in list(rejected.items())[:1])
        raise DataError(
            f"{base}: expected one sub-folder of images per class, found none; or give a label file (--labels){why}"
        )
    return wanted


def _by_rows(base: Path, rows: dict[str, LabelRow], rejected: dict[str, str]) -> dict[Path, LabelRow]:
    wanted: dict[Path, LabelRow] = {}
    spellings = cache(partial(by_composed_name, base))
    folders: list[tuple[Path, LabelRow]] = []
    refused: set[Path] = set()
    for name, row in rows.items():
        target = inside(base, base / name)
        if target is not None and not exists(target):
            alike = spellings().get(composed(base, target), [])
            if len(alike) != 1:
                rejected[name] = _ALIKE if alike else _ABSENT
                continue
            target = alike[0]
        if target is None:
            rejected[name] = "the path leads outside the folder of images; correct the label file"
        elif target.is_dir():
            folders.append((target, row))
        elif not target.is_file():
            rejected[name] = _ABSENT
        elif target in wanted and _content(wanted[target]) != _content(row):
            rejected[name] = f"the label file has two rows for this file that differ (also {wanted[target].path})"
            refused.add(target)
        else:
            wanted[target] = row
    for folder, row in folders:
        members = [path for path in walk(folder) if inside(base, path) is not None]
        for path in members:
            wanted.setdefault(path, row)
        if not members:
            rejected[row.path] = "the folder has no files; correct the label file"
    for path in refused:
        wanted.pop(path, None)
    for path in walk(base):
        name = path.relative_to(base).as_posix()
        target = inside(base, path)
        known = target in wanted or target in refused or name in rejected
        if not known and (path.suffix.lower() in SUFFIXES or is_dicom(path)):
            rejected[name] = "the label file has no row for this file"
    return wanted


def _pictures(path: Path, name: str, row: LabelRow, options: FolderOptions) -> list[_Found]:
    if not path.is_file():  # a pipe would be waited for without end
        raise DataError(f"{name}: {_NO_FILE}")
    if not is_dicom(path):
        return [_found(path, name, None, row, row.patient or "")]
    middle = options.slices == "middle"
    header = read_header(path, name, places=middle)
    stated = header.patient if row.patient is None else row.patient
    if header.frames == 1:
        return [_found(path, name, 0, row, stated, header.series, header.place)]
    frames = [header.middle] if middle else range(header.frames)
    return [_found(path, name, frame, row, stated) for frame in frames]


def _found(
    path: Path, name: str, frame: int | None, row: LabelRow, stated: str, series: str = "", place: Slice = NO_PLACE
) -> _Found:
    return _Found(path, name, frame, row, stated.strip(), patient_identifier(stated), series, place)


def _middle_of_series(found: list[_Found]) -> list[_Found]:
    """Keep, of each series of single-frame files with one label and patient, the middle one by where it lies."""
    series: dict[tuple[str, str | tuple[int, ...], str], list[_Found]] = {}
    kept: list[_Found] = []
    for one in found:
        if one.series:
            series.setdefault((one.series, one.row.label, one.patient), []).append(one)
        else:
            kept.append(one)
    for members in series.values():
        order = in_order([one.place for one in members], [one.name for one in members])
        kept.append(members[order[len(order) // 2]])
    return sorted(kept, key=lambda one: (one.path, one.frame or 0))


def _has_patients(root: Path, found: list[_Found]) -> bool:
    """Tell whether patients are known: for most images (the others are rejected one by one), or for none."""
    known = sum(one.patient != "" for one in found)
    if 0 < known <= len(found) / 2:
        raise DataError(
            f"{root}: the patient is known for {known} of {len(found)} images; expected all or none: give "
            f"a patient "
            "column in the label file, or leave patients out (--no-patients)"
        )
    return known > 0


def _item(one: _Found, label: Label, patients: bool, window: Window | None) -> Item:
    source = _source(one)
    status = one.path.stat()
    load = (
        partial(read_image, one.path, source)
        if one.frame is None
        else partial(read_frame, one.path, source, one.frame, window)
    )
    return Item(
        source=source,
        load=load,
        label=label,
        patient=one.patient if patients else None,
        columns=one.row.extra,
        stamp=(one.name, -1 if one.frame is None else one.frame, status.st_size, status.st_mtime_ns),
    )


def _source(one: _Found) -> str:
    return one.name if not one.frame else f"{one.name}#{one.frame}"


def _content(row: LabelRow) -> tuple[str | tuple[int, ...], str | None, tuple[str, ...]]:
    return row.label, row.patient, row.extra
