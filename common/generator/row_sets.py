"""A set of synthetic rows that is fixed before one of them is drawn: a run's published set, or more of the same.

Rows are drawn in pieces of a fixed size, each by one thread. Which numbers a row gets depends on its own number in the
set alone; pieces matter only for the last bits of a sum, so that the same machine gives the same bytes whatever the
number of threads, and however far a reader goes.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.evaluation.scores import Split
from common.generator.row_law import RowDrawer, RowLaw

ROWS_FORMAT = "philox4x64-10/1"
"""How rows are drawn, as a published generator names it: a set of another format can't be drawn again."""
MOST_TRIES = 128  # of a row; a class that the posterior gives one row in fifty is met in 92 of 100 then
_PIECE_VALUES = 2**20  # drawn at once: measured, larger pieces spend their time on fresh memory
_BLOCK_VALUES = 2**23
_MOST_PIECE_ROWS = 2**12
_MOST_THREADS = 4
_M_ARENA_MAX = -8  # of glibc's malloc.h


def piece_rows(dim: int) -> int:
    """Rows in a piece of embeddings of width `dim`: a power of two, about 8 MB; it depends on nothing else."""
    return min(_MOST_PIECE_ROWS, 2 ** max(int(math.log2(_PIECE_VALUES / dim)), 0))


@dataclass(frozen=True)
class RowSet:
    """Rows 0..total-1 of a law.

    Attributes:
        law: what they are drawn from.
        key: of their random numbers.
        total: how many.
        labels_of: numbers (n,) int64 -> the classes that these rows should have (n,), or findings (n, K).
        tries: of each row at most; 1: rows stand as they come, with the class that the generator gives them.
    """

    law: RowLaw
    key: int
    total: int
    labels_of: Callable[[Tensor], Tensor]
    tries: int

    @cached_property
    def _drawer(self) -> RowDrawer:
        return RowDrawer(self.law, self.key, self.tries)

    @property
    def block_rows(self) -> int:
        """Rows in a block: a whole number of pieces."""
        piece = piece_rows(self.law.dim)
        return piece * max(_BLOCK_VALUES // (piece * self.law.dim), 1)

    def some(self, numbers: NDArray[np.int64], nudge: float = 0.0) -> Split:
        """Single rows, by ascending numbers (n,): embeddings (n, d) float32 and labels (n,); see `RowDrawer.draw`."""
        return self._drawer.draw(numbers, self.labels_of(torch.from_numpy(numbers)), nudge)

    def all(self, threads: int | None = None) -> Split:
        """All rows at once in memory."""
        parts = list(self.blocks(threads))
        return torch.cat([values for values, _ in parts]), torch.cat([labels for _, labels in parts])

    def blocks(self, threads: int | None = None) -> Iterator[Split]:
        """All rows in order, block by block, some blocks drawn ahead by other threads.

        Args:
            threads: at most so many blocks at once; default: one a core, at most 4.
        """
        workers = max(1, min(os.cpu_count() or 1, _MOST_THREADS) if threads is None else threads)
        before, piece = torch.get_num_threads(), piece_rows(self.law.dim)

        def one_block(start: int) -> Split:
            count = min(self.block_rows, self.total - start)
            values, labels = torch.empty(count, self.law.dim), list[Tensor]()
            for at in range(0, count, piece):
                part = slice(at, min(at + piece, count))
                values[part], of_part = self.some(np.arange(start + at, start + part.stop))
                labels.append(of_part)
            return values, torch.cat(labels)

        _share_one_heap()
        self._drawer  # noqa: B018  made once, before threads ask for it
        # one thread of torch in each of ours: sums are then added in the same order whatever the number of cores
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            left = iter(range(0, self.total, self.block_rows))
            ahead: deque[Future[Split]] = deque(pool.submit(one_block, start) for start in islice(left, workers))
            while ahead:
                ready = ahead.popleft().result()
                following = next(left, None)
                if following is not None:
                    ahead.append(pool.submit(one_block, following))
                yield ready
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)


def _share_one_heap() -> None:
    """Have threads that start later allocate where the first does.

    glibc gives each a heap of its own else, and the holes in these grow with the set: 2 GiB for a million rows.
    """
    with suppress(OSError, AttributeError):  # another C library has no such setting, and no such heaps
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
