"""Read arrays: MedMNIST's `.npz` of images, and embeddings that somebody made already.

An archive's arrays are unpacked to a working folder and mapped from there, so that memory does not grow with
them. Pickled objects are never read.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.wire.identity import EncoderIdentity
from embeddings.bounded import unpack
from embeddings.limits import check_size
from embeddings.pipeline import Item, Listing
from embeddings.readers.classes import ArrayTexts, array_classes, array_texts
from embeddings.readers.labels import check_columns
from embeddings.readers.patients import patient_identifier, patient_number
from embeddings.store.sets import EmbeddingSet, SetMetadata
from embeddings.store.writing import write_chunks

_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def list_medmnist(path: Path, work: Path, classes: Sequence[str] | None) -> Listing:
    """List the images of a MedMNIST archive, with its own training, validation and test split.

    Args:
        path: `.npz` with `{train,val,test}_{images,labels}`; images (n, h, w) or (n, h, w, 3) uint8, labels
            (n, 1).
        work: folder to unpack the images into.
        classes: class names in label order, or None for the numbers.

    Returns:
        The listing, in the order of the file.

    Raises:
        DataError: the file is no such archive, is damaged, or has several labels per image; the disk is full.
    """
    status = _status(path)
    items: list[Item] = []
    rejected: list[tuple[str, str]] = []
    pictures: list[NDArray[Any]] = []
    labels: list[ArrayTexts] = []
    for prefix in _SPLITS:
        images = unpack(path, f"{prefix}_images", work)
        pictures.append(images)
        labels.append(_labels(path, prefix, images, unpack(path, f"{prefix}_labels", work)))
    names, numbers, expected = array_classes(labels, classes)
    for prefix, images, texts, values in zip(_SPLITS, pictures, labels, numbers, strict=True):
        for row, label in enumerate(values):
            source = f"{path.name}[{prefix}_images][{row}]"
            if label < 0:
                rejected.append((source, f"unknown label {texts[row]}; expected {expected}"))
                continue
            stamp = (path.name, prefix, row, status.st_size, status.st_mtime_ns)
            load = partial(_row, images, row)
            items.append(Item(source, load, int(label), split=_SPLITS[prefix], stamp=stamp))
    return Listing(tuple(items), tuple(rejected), names)


def is_medmnist(path: Path) -> bool:
    """Tell whether an archive holds the arrays of a MedMNIST set."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected an .npz archive; it can't be read ({type(error).__name__})") from None
    return {f"{prefix}_{what}.npy" for prefix in _SPLITS for what in ("images", "labels")} <= names


@dataclasses.dataclass(frozen=True)
class ReadyNames:
    """Names of the arrays in an archive of ready embeddings; `patients` and `columns` are optional."""

    embeddings: str = "embeddings"
    labels: str = "labels"
    class_names: str = "class_names"
    patients: str | None = None
    columns: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ready:
    """Embeddings made elsewhere: mapped rows, those to keep, and what the others lack."""

    embeddings: NDArray[Any]
    labels: NDArray[np.int64]
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
                metadata=SetMetadata(identity),
                groups=None if patient_numbers is None else patient_numbers[rows],
                columns={name: values[rows] for name, values in self.columns.items()},
            )


def read_ready(path: Path, work: Path, names: ReadyNames, classes: Sequence[str] | None) -> Ready:
    """Read an archive of ready embeddings.

    Args:
        path: `.npz` with `embeddings` (n, d) of floats and `labels` (n,), numbers or names of classes.
        work: folder to unpack the embeddings into.
        names: what the arrays are called.
        classes: class names in label order; None takes the archive's own list, or the labels found.

    Returns:
        The rows; those that are not finite, or whose label is outside the classes, are in `rejected`.

    Raises:
        DataError: an array is missing, damaged, or of the wrong shape or type.
    """
    embeddings = unpack(path, names.embeddings, work)
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or 0 in embeddings.shape:
        raise DataError(
            f"{path}: expected {names.embeddings} as (n, d) floats, found {embeddings.shape} {embeddings.dtype}"
        )
    check_columns(names.columns)
    labels = _column(path, names.labels, work, len(embeddings))
    class_names, (numbers,), _ = array_classes([labels], classes, _own_list(path, names.class_names, work))
    fine = numbers >= 0
    rejected = [
        (_where(path, row), f"unknown label {labels[row]}" if labels[row] else "no label")
        for row in np.flatnonzero(~fine)
    ]
    patients = None if names.patients is None else _column(path, names.patients, work, len(embeddings))
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
    further = {name: _column(path, name, work, len(embeddings)) for name in names.columns}
    texts = {name: column.per_row(column.texts) for name, column in further.items()}
    return Ready(embeddings, numbers, np.flatnonzero(fine), patients, texts, class_names, tuple(sorted(rejected)))


def _column(path: Path, name: str, work: Path, rows: int | None) -> ArrayTexts:
    values = unpack(path, name, work).reshape(-1)
    rows = values.size if rows is None else rows
    if values.shape != (rows,) or values.dtype.kind not in "iuUS":
        raise DataError(
            f"{path}: expected {name} as {rows} whole numbers or texts, found {values.shape} {values.dtype}"
        )
    return array_texts(f"{path}: the array {name}", values)


def _own_list(path: Path, name: str, work: Path) -> list[str] | None:
    with zipfile.ZipFile(path) as archive:
        present = f"{name}.npy" in archive.namelist()
    if not present:
        return None
    listed = _column(path, name, work, None)
    return [listed[row] for row in range(len(listed.places))]


def _labels(path: Path, prefix: str, images: NDArray[Any], values: NDArray[Any]) -> ArrayTexts:
    grey_or_colour = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if not grey_or_colour or images.dtype != np.uint8:
        raise DataError(
            f"{path}: expected {prefix}_images as (n, h, w) or (n, h, w, 3) uint8, found {images.shape} {images.dtype}"
        )
    check_size(f"{path}", images.shape[2], images.shape[1])
    flat = values.reshape(len(values), -1) if len(values) else values.reshape(0, 1)
    if flat.shape != (len(images), 1) or flat.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected {prefix}_labels as one whole number per image, found {values.shape} "
            f"{values.dtype} for "
            f"{len(images)} images"
        )
    return array_texts(f"{path}: {prefix}_labels", flat[:, 0])


def _row(images: NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images[row])


def _where(path: Path, row: object) -> str:
    return f"{path.name}[{row}]"


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None


def import_ready(
    path: Path,
    out: Path,
    names: ReadyNames,
    classes: Sequence[str] | None,
    declared: EncoderIdentity,
    salt: bytes,
    precision: str,
) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Write a store of ready embeddings.

    Args:
        path: the archive.
        out: the store.
        names: what the arrays are called.
        classes: class names in label order, or None.
        declared: what the site says of the encoder; width and classes are filled in.
        salt: of the site; hashes patients.
        precision: of the stored embeddings.

    Returns:
        Rows written, and the rejected (source, reason).

    Raises:
        DataError: as `read_ready`, or no row is left, or the disk is full.
    """
    if path.suffix.lower() != ".npz" or not path.is_file():
        raise DataError(f"{path}: expected an .npz archive of ready embeddings")
    work = out.with_name(f".{out.name}.work")
    try:
        ready = read_ready(path, work, names, classes)
        identity = dataclasses.replace(
            declared, dimension=int(ready.embeddings.shape[1]), class_names=ready.class_names
        )
        numbers = None
        if ready.patients is not None:
            numbers = ready.patients.per_row([patient_number(salt, text) for text in ready.patients.texts])
        if not ready.kept.size:
            source, reason = ready.rejected[0]
            raise DataError(f"{path}: none of {len(ready.rejected)} rows can be used; the first: {source}: {reason}")
        write_chunks(out, lambda: ready.chunks(identity, numbers), SetMetadata(identity), precision=precision)
        return int(ready.kept.size), ready.rejected
    finally:
        shutil.rmtree(work, ignore_errors=True)
