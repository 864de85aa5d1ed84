"""A set divided into training, validation and test rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPLIT_NAMES = ("train", "validation", "test")
SPLIT_SHARES = (0.64, 0.16, 0.20)


def split_site(
    labels: NDArray[np.int64], rng: np.random.Generator, groups: NDArray[np.int64] | None = None
) -> NDArray[np.str_]:
    """Divide a site's rows 64/16/20 into training, validation and test, per class where the counts allow.

    Each unit (a row, or a patient under the class most of its rows have) goes in random order to the split
    that is furthest below its share of the class; so a class with one unit trains, with two it also tests.

    Args:
        labels: (n,) class of each row.
        rng: generator of the order.
        groups: (n,) patient of each row, or None; a patient's rows stay together.

    Returns:
        (n,) `train`, `validation` or `test`.
    """
    units = np.arange(labels.size) if groups is None else groups
    _, member = np.unique(units, return_inverse=True)
    sizes = np.bincount(member)
    unit_class = labels if groups is None else majority_labels(labels, member)
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


def majority_labels(labels: NDArray[np.int64], member: NDArray[np.intp]) -> NDArray[np.int64]:
    """The class that most rows of each unit have.

    Args:
        labels: (n,) class of each row.
        member: (n,) unit of each row, 0..units-1, each at least once.

    Returns:
        (units,) class; the lowest of those that tie.
    """
    table = np.zeros((int(member.max()) + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(table, (member, labels), 1)
    return table.argmax(axis=1)
