"""A set divided into training, validation and test rows."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLIT_NAMES = ("train", "validation", "test")
SPLIT_SHARES = (0.64, 0.16, 0.20)


def split_site(
    labels: NDArray[np.integer[Any]], rng: np.random.Generator, groups: NDArray[np.int64] | None = None
) -> NDArray[np.str_]:
    """Divide a site's rows 64/16/20 into training, validation and test, per class where the counts allow.

    Each unit (a row, or a patient, under its class of `unit_classes`) goes in random order to the split
    that is furthest below its share of the class; so a class with one unit trains, with two it also tests.

    Args:
        labels: (n,) class of each row, or (n, K) findings: 1, 0 or -1.
        rng: generator of the order.
        groups: (n,) patient of each row, or None; a patient's rows stay together.

    Returns:
        (n,) `train`, `validation` or `test`.
    """
    units = np.arange(len(labels)) if groups is None else groups
    _, member = np.unique(units, return_inverse=True)
    sizes = np.bincount(member)
    unit_class = unit_classes(labels, member)
    choice = np.zeros(sizes.size, dtype=np.int64)
    shares = np.asarray(SPLIT_SHARES)
    for label in np.unique(unit_class):
        chosen = rng.permutation(np.flatnonzero(unit_class == label))
        left = shares * float(sizes[chosen].sum())
        for unit in chosen:
            split = int(np.argmax(left))
            choice[unit] = split
            left[split] -= sizes[unit]
    return np.asarray(SPLIT_NAMES)[choice[member]]


def unit_classes(labels: NDArray[np.integer[Any]], member: NDArray[np.intp]) -> NDArray[np.int64]:
    """One class for each unit, by which sets are divided evenly or unevenly.

    Args:
        labels: (n,) class of each row, or (n, K) findings: 1, 0 or -1.
        member: (n,) unit of each row, 0..units-1, each at least once.

    Returns:
        (units,) the class that most rows of the unit have, the lowest of those that tie; of findings the rarest one
        that a row of the unit has, or K where it has none, so that rare findings are dealt out like rare classes.
    """
    num_units = int(member.max(initial=-1)) + 1
    if labels.ndim == 2:
        present = np.zeros((num_units, labels.shape[1] + 1), dtype=bool)
        np.logical_or.at(present, member, np.pad(labels == 1, ((0, 0), (0, 1))))
        present[:, -1] = True  # behind all findings, however rare those without one are
        rarest_first = np.append(np.argsort(present[:, :-1].sum(axis=0), kind="stable"), labels.shape[1])
        return rarest_first[present[:, rarest_first].argmax(axis=1)]
    table = np.zeros((num_units, int(labels.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(table, (member, labels), 1)
    return table.argmax(axis=1)


def split_by_unit(embeddings: NDArray[np.float32], groups: NDArray[np.int64] | None) -> NDArray[np.str_]:
    """Divide a site's rows 64/16/20, each unit by a hash of itself alone.

    A draw over all rows, or one that balances the classes, would move other patients' rows between training and test
    when one patient joins or leaves: two data sets that differ by one unit would then differ by many in training, and
    the guarantee would not hold for the data set as a whole.

    Args:
        embeddings: (n, d) as the site's file has them.
        groups: (n,) patient of each row, or None: then a row's embedding is its unit.

    Returns:
        (n,) "train", "validation" or "test"; a patient's rows stay together. A small site may train on few rows.
    """
    if groups is not None:
        names = [str(int(group)).encode() for group in groups]
    else:
        names = [row.tobytes() for row in np.ascontiguousarray(embeddings)]
    draws = [int.from_bytes(hashlib.sha256(b"split/" + name).digest()[:8], "big") / 2.0**64 for name in names]
    parts = np.searchsorted(np.cumsum(SPLIT_SHARES)[:-1], draws, side="right")
    return np.asarray(SPLIT_NAMES)[parts]
