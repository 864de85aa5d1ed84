"""Drawing rows from a published generator, block by block, without limit.

Rows are made in pieces of a fixed size, each from its own stream of the seed, and each by one thread: what is drawn
depends on neither the number of threads nor on how far a reader goes. Between machines the last bits may differ, since
their processors add in another order.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from common.class_filling import fill_classes
from common.classifier import Split
from common.errors import ConfigError
from common.methods.base import Artifact

Code = int | str | None
_PIECE_VALUES = 2**20  # what a method draws at once: measured, larger pieces spend their time on fresh memory
_MOST_PIECE_ROWS = 2**12
_PIECES = 16  # of a block, which a reader gets as one
_MOST_THREADS = 4
_GOLDEN = (math.sqrt(5) - 1) / 2
MOST_ROWS = 1_000_000_000


def piece_rows(dim: int) -> int:
    """Rows in a piece of embeddings of width `dim`: a power of two, about 4 MB; it depends on nothing else."""
    return min(_MOST_PIECE_ROWS, 2 ** max(int(math.log2(_PIECE_VALUES / dim)), 0))


def wanted_counts(rows: int, weights: Sequence[float]) -> list[int]:
    """How many rows of each class make `rows` in all: shares by weight, the rest to the largest remainders.

    Args:
        rows: at least 1.
        weights: (K,), each at least 0 and finite, not all 0.

    Raises:
        ConfigError: rows or weights out of range.
    """
    if not 1 <= rows <= MOST_ROWS:
        raise ConfigError(f"rows must be between 1 and {MOST_ROWS}, found {rows}: draw in several parts")
    if not weights or any(not (0 <= weight < math.inf) for weight in weights) or sum(weights) <= 0:
        raise ConfigError(f"expected class weights of at least 0 that are not all 0, found {list(weights)}")
    exact = [rows * weight / sum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: rows - sum(counts)]:
        counts[index] += 1
    return counts


def interleaved_labels(counts: Sequence[int], start: int, stop: int) -> Tensor:
    """Labels of rows start..stop of a set with so many rows of each class, evenly mixed: (stop - start,).

    Every stretch of rows has the classes nearly in proportion, and nothing is kept in memory: row i takes place
    (i x stride) mod N of the sorted labels, with a stride near N times the golden ratio and without a common divisor.
    """
    total = sum(counts)
    stride = max(round(total * _GOLDEN), 1)
    while math.gcd(stride, total) > 1:
        stride += 1
    places = torch.arange(start, stop) * stride % total
    edges = torch.cumsum(torch.tensor(list(counts)), 0)
    return torch.searchsorted(edges, places, right=True)


def with_code(artifact: Artifact, code: Code) -> Artifact:
    """The same generator, sampled at one of its codes.

    Args:
        artifact: what a run published.
        code: None, as published; "meta", the one code that was fitted to the released statistics; "mixture", all codes
            by their weights; a number (or its text), that code of the mixture.

    Raises:
        ConfigError: the generator has no such code.
    """
    if code is None:
        return artifact
    if "meta.codes" not in artifact.tensors:
        raise ConfigError(f"this generator has no codes: leave the code out, found {code!r}")
    codes, weights = artifact.tensors["meta.codes"], artifact.tensors["meta.weights"]
    count = codes.shape[0]
    if code == "mixture":
        return artifact
    if code == "meta":
        if count > 1:
            raise ConfigError(f"this run fitted a mixture of {count} codes: ask for mixture, or for 0 to {count - 1}")
        return artifact
    text = str(code)
    if not text.isascii() or not text.isdigit() or int(text) >= count:
        raise ConfigError(f"code must be meta, mixture or a number from 0 to {count - 1}, found {code!r}")
    index = int(text)
    chosen = {"meta.codes": codes[index : index + 1], "meta.weights": torch.ones_like(weights[:1])}
    return replace(artifact, tensors={**artifact.tensors, **chosen})


def stream_blocks(
    draw: Callable[[Tensor, int], Split],
    labels_of: Callable[[int, int], Tensor],
    rows: int,
    piece: int,
    seed: int,
    threads: int | None = None,
    *,
    as_drawn: bool = False,
) -> Iterator[Split]:
    """Blocks of 16 pieces in order, some of them drawn ahead by other threads.

    Rows get the labels that are wanted: see `class_filling`.

    Args:
        draw: (wanted labels (n,), seed of the piece) -> embeddings (n, d) and labels (n,).
        labels_of: (start, stop) -> wanted labels of those rows.
        rows: how many in all.
        piece: rows in a piece.
        seed: of the whole.
        threads: at most so many blocks at once; default: one a core, at most 4.
        as_drawn: take each row with the label that `draw` gave it, whatever was wanted.
    """
    workers = max(1, min(os.cpu_count() or 1, _MOST_THREADS) if threads is None else threads)
    before = torch.get_num_threads()

    def one_block(block: int) -> Split:
        wanted, first = labels_of(block, min(block + _PIECES * piece, rows)), block // piece
        pieces = enumerate(wanted.split(piece), start=first)
        parts = [draw(labels, _seed_of_piece(seed, str(index))) for index, labels in pieces]
        if not as_drawn:
            return fill_classes(draw, wanted, parts, piece, lambda more: _seed_of_piece(seed, f"{first}/more/{more}"))
        return torch.cat([values for values, _ in parts]), torch.cat([labels for _, labels in parts])

    # one thread of torch in each of ours: sums are then added in the same order whatever the number of cores
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        left = iter(range(0, rows, _PIECES * piece))
        ahead: deque[Future[Split]] = deque(pool.submit(one_block, block) for block in islice(left, workers))
        while ahead:
            ready = ahead.popleft().result()
            following = next(left, None)
            if following is not None:
                ahead.append(pool.submit(one_block, following))
            yield ready
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _seed_of_piece(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"bundle/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
