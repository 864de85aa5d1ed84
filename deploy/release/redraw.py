"""Whether a published set is what its generator draws: rows are drawn again and compared, whatever the set says.

Between machines a sum may differ in its last bits. So a coordinate may be one step of float32 away from its due value,
and few may be. A row whose posterior stands on the border between two classes may be the row of the other side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray

from common.assurance.audit_run import Watch
from common.errors import FedHypeVAEError
from common.evaluation.scores import Split
from common.generator.row_sets import RowSet, piece_rows
from common.publishing.bundle import Bundle

FOREIGN = "the synthetic set is not what the generator draws"
SAMPLED_ROWS = 1000
SAMPLE_CERTAINTY = 0.99
_ROUNDING = 1e-10  # of a row's length: what sums in float64 may differ by
_BORDER = 1e-9  # of a class score; float64 sums are ten thousand times closer
_MOST_ON_BORDERS = 3  # rows of a set; a million rows have one with a chance of one in a hundred thousand
_MOST_STEPS = 1e-4  # share of all coordinates that may be a step away: two in a million are, or fewer
_FEW_STEPS = 16


def check_every_row(bundle: Bundle, watch: Watch) -> None:
    """Draw a published set again and compare all of it: every row, every label, their order and their number.

    Args:
        bundle: of a run or a release.
        watch: called now and then with (what is done, rows done, in all).

    Raises:
        FedHypeVAEError: the set is another one; names the row. DataError: it can't be read.
    """
    due = _due(bundle)
    comparison, done, piece = _Comparison(due), 0, piece_rows(due.law.dim)
    for drawn, found in zip_longest(due.blocks(), _in_blocks(bundle.stream_published(), due.block_rows)):
        if drawn is None or found is None or len(drawn[1]) != len(found[1]):
            raise _other_number(due)
        for at in range(0, len(drawn[1]), piece):  # small parts stay in the processor's cache
            part = slice(at, min(at + piece, len(drawn[1])))
            numbers = np.arange(done + part.start, done + part.stop)
            comparison.compare(numbers, (drawn[0][part], drawn[1][part]), (found[0][part], found[1][part]))
        done += len(drawn[1])
        watch("drawing every row again", done, due.total)


def check_sampled_rows(bundle: Bundle, watch: Watch) -> float:
    """Draw some rows again, chosen by the operating system's entropy, so that nobody can know which.

    Returns:
        The share of foreign rows above which a set would be found with `SAMPLE_CERTAINTY`: 1 - (1 - certainty)^(1/n).

    Raises:
        FedHypeVAEError: a sampled row is another one, or the number of rows is. DataError: the set can't be read.
    """
    due = _due(bundle)
    count = min(SAMPLED_ROWS, due.total)
    chosen = np.array(sorted(random.SystemRandom().sample(range(due.total), count)), dtype=np.int64)
    comparison, done = _Comparison(due), 0
    for rows, labels in bundle.stream_published():
        numbers = chosen[(chosen >= done) & (chosen < done + len(labels))]
        for part in np.split(numbers, range(piece_rows(due.law.dim), len(numbers), piece_rows(due.law.dim))):
            comparison.compare(part, due.some(part), (rows[part - done], labels[part - done]))
        done += len(labels)
        watch("drawing sampled rows again", min(done, due.total), due.total)
    if done != due.total:
        raise _other_number(due)
    return missed_share(count)


def missed_share(rows: int) -> float:
    """The share of foreign rows that `rows` sampled ones find with `SAMPLE_CERTAINTY`."""
    return 1.0 - math.pow(1.0 - SAMPLE_CERTAINTY, 1.0 / rows)


def _due(bundle: Bundle) -> RowSet:
    due = bundle.due_set
    if due is None:
        raise FedHypeVAEError(f"{FOREIGN}: method {bundle.config.method} draws none")
    return due


def _other_number(due: RowSet) -> FedHypeVAEError:
    return FedHypeVAEError(f"{FOREIGN}: its settings ask for {due.total} rows, and it holds another number")


class _Comparison:
    """Holds rows against what they have to be, and counts what rounding may explain."""

    def __init__(self, due: RowSet) -> None:
        self._due = due
        self._on_borders, self._steps = 0, 0
        self._most_steps = max(int(_MOST_STEPS * due.total * due.law.dim), _FEW_STEPS)

    def compare(self, numbers: NDArray[np.int64], drawn: Split, found: Split) -> None:
        """Compare rows by their numbers. Raises FedHypeVAEError."""
        if torch.equal(drawn[0], found[0]) and torch.equal(drawn[1], found[1]):
            return
        same = _same(drawn, found)
        self._steps += int((drawn[0][same] != found[0][same]).sum())
        other = np.flatnonzero(~same.numpy())
        self._on_borders += len(other)
        if len(other) and (self._on_borders > _MOST_ON_BORDERS or not self._on_a_border(numbers, other, found)):
            raise FedHypeVAEError(f"{FOREIGN}: row {numbers[other[0]]} was replaced or changed, or its label was")
        if self._steps > self._most_steps:
            raise FedHypeVAEError(f"{FOREIGN}: more last digits differ than rounding on another machine explains")

    def _on_a_border(self, numbers: NDArray[np.int64], other: NDArray[np.int64], found: Split) -> bool:
        rows = found[0][other], found[1][other]
        sides = [_same(self._due.some(numbers[other], nudge), rows) for nudge in (_BORDER, -_BORDER)]
        return bool((sides[0] | sides[1]).all())


def _same(drawn: Split, found: Split) -> torch.Tensor:
    """Which rows have the label, and every coordinate within a step of float32: (n,) bool."""
    due, there = drawn[0].numpy(), found[0].numpy()
    length = np.linalg.norm(due, axis=1, keepdims=True)
    allowed = np.spacing(np.abs(due)) + _ROUNDING * length
    near = (np.abs(there.astype(np.float64) - due) <= allowed).all(1)
    labelled = drawn[1] == found[1]
    return torch.from_numpy(near) & (labelled if labelled.ndim == 1 else labelled.all(1))


def _in_blocks(parts: Iterable[Split], rows: int) -> Iterator[Split]:
    """The same rows in blocks of another size, the last one shorter."""
    values, labels = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    for more, more_labels in parts:
        values = torch.cat([values, more]) if len(values) else more
        labels = torch.cat([labels, more_labels]) if len(labels) else more_labels
        while len(labels) >= rows:
            yield values[:rows], labels[:rows]
            values, labels = values[rows:], labels[rows:]
    if len(labels):
        yield values, labels
