"""Read MedMNIST's `.npz` of images.

An archive's arrays are unpacked to a working folder and mapped from there, so that memory does not grow with
them. Pickled objects are never read.
"""

from __future__ import annotations

import os
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from embeddings.bounded import unpack
from embeddings.limits import check_size
from embeddings.pipeline import Item, Listing
from embeddings.readers.classes import ArrayTexts, array_texts
from embeddings.readers.findings import LabelForm, array_labels

_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def list_medmnist(path: Path, work: Path, form: LabelForm) -> Listing:
    """List the images of a MedMNIST archive, with its own training, validation and test split.

    Args:
        path: `.npz` with `{train,val,test}_{images,labels}`; images (n, h, w) or (n, h, w, 3) uint8, labels
            (n, 1), or (n, K) for findings.
        work: folder to unpack the images into.
        form: what the labels are; without names agreed, classes have their numbers as names.

    Returns:
        The listing, in the order of the file.

    Raises:
        DataError: the file is no such archive, is damaged, or has other labels than the form says; the disk is full.
    """
    status = _status(path)
    items: list[Item] = []
    rejected: list[tuple[str, str]] = []
    pictures: list[NDArray[Any]] = []
    labels: list[list[ArrayTexts]] = []
    for prefix in _SPLITS:
        images = unpack(path, f"{prefix}_images", work)
        pictures.append(images)
        labels.append(_labels(path, prefix, images, unpack(path, f"{prefix}_labels", work), form))
    found = array_labels(form, labels, cells=form.task == "multilabel")
    for prefix, images, values, refused in zip(_SPLITS, pictures, found.labels, found.rejected, strict=True):
        for row, label in enumerate(values.tolist()):
            source = f"{path.name}[{prefix}_images][{row}]"
            if row in refused:
                rejected.append((source, refused[row]))
                continue
            stamp = (path.name, prefix, row, status.st_size, status.st_mtime_ns)
            load = partial(_row, images, row)
            label = tuple(label) if isinstance(label, list) else label
            items.append(Item(source, load, label, split=_SPLITS[prefix], stamp=stamp))
    return Listing(tuple(items), tuple(rejected), found.names, task=form.task)


def is_medmnist(path: Path) -> bool:
    """Tell whether an archive holds the arrays of a MedMNIST set."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected an .npz archive; it can't be read ({type(error).__name__})") from None
    return {f"{prefix}_{what}.npy" for prefix in _SPLITS for what in ("images", "labels")} <= names


def _labels(path: Path, prefix: str, images: NDArray[Any], values: NDArray[Any], form: LabelForm) -> list[ArrayTexts]:
    grey_or_colour = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if not grey_or_colour or images.dtype != np.uint8:
        raise DataError(
            f"{path}: expected {prefix}_images as (n, h, w) or (n, h, w, 3) uint8, found {images.shape} {images.dtype}"
        )
    check_size(f"{path}", images.shape[2], images.shape[1])
    flat = values if values.ndim == 2 else values.reshape(len(values), -1 if len(values) else 1)
    width = flat.shape[1] if form.task == "multilabel" else 1
    if flat.shape != (len(images), width) or flat.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected {prefix}_labels as one whole number per image (several with --task multilabel), found "
            f"{values.shape} {values.dtype} for {len(images)} images"
        )
    return [array_texts(f"{path}: {prefix}_labels", column) for column in flat.T]


def _row(images: NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images[row])


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
