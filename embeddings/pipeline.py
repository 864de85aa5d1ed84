"""Decode and embed a stream of images, in order, in constant memory, on all cores.

Each worker takes a batch, decodes and prepares its images, and then runs the network: on a CPU one forward
pass per core, each on one thread (two passes side by side lose nothing to barriers, and the result does not
depend on the number of cores); on a GPU one at a time, while the other workers decode. A batch is always
padded to its full size, so that a row's value does not depend on how many of its neighbours could be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.names import Task
from embeddings.encoders.base import Encoder


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image to embed, with its class, or its findings as 1, 0, -1 (present, absent, unknown).

    `source` (file, and frame) and `patient` (as the site names it) are never stored.
    `stamp` is what an image is known by in a second extraction: its path, frame, size and time of change.
    """

    source: str
    load: Callable[[], NDArray[np.uint8]]
    label: int | tuple[int, ...]
    patient: str | None = None
    columns: tuple[str, ...] = ()
    split: str | None = None
    stamp: tuple[str | int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a site has to embed: `items` in a fixed order, `rejected` (source, reason) pairs, and remarks.

    `column_names` name each item's `columns`. `rendering` is what the reader was asked to show the files by (a
    DICOM window): a part of the preprocessing that sites compare. `shallow` names the pictures of 16 bits that use
    12 at most; it fills while they are read.
    """

    items: tuple[Item, ...]
    rejected: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...]
    column_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    rendering: str = ""
    shallow: list[str] = dataclasses.field(default_factory=list)
    task: Task = "multiclass"


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch done: `embeddings` (k, d) of the `items` that could be read, and the others with why."""

    index: int
    embeddings: NDArray[np.float32]
    items: tuple[Item, ...]
    rejected: tuple[tuple[Item, str], ...]


def core_count() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def embed_batches(items: Iterable[Item], encoder: Encoder, *, workers: int | None = None) -> Iterator[Batch]:
    """Embed items in batches of the encoder's size, in order; decoding overlaps with compute.

    Args:
        items: the images; taken from the iterator a bounded number ahead.
        encoder: the frozen encoder.
        workers: threads; None takes one per core and one more, which reads while the others compute.

    Yields:
        One `Batch` per `encoder.batch_size` items. An item whose `load` raises `DataError`, or which
        the encoder can't prepare, is in `rejected`.
    """
    from common.devices import one_thread  # torch is imported where it is used

    slots = core_count() if encoder.device == "cpu" else 1
    threads = slots + 1 if encoder.device == "cpu" else core_count() + 1
    threads = threads if workers is None else workers
    forward_slots = threading.Semaphore(slots)
    batches = enumerate(_cut(items, encoder.batch_size))
    # every forward pass on one thread while the pool runs
    alone = one_thread() if encoder.device == "cpu" else contextlib.nullcontext()
    with alone, ThreadPoolExecutor(threads, "embed") as pool:
        pending: deque[Future[Batch]] = deque()
        try:
            for index, batch in batches:
                pending.append(pool.submit(_embed_batch, index, batch, encoder, forward_slots))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _embed_batch(index: int, batch: Sequence[Item], encoder: Encoder, forward_slots: threading.Semaphore) -> Batch:
    rows: list[NDArray[np.uint8]] = []
    good: list[Item] = []
    rejected: list[tuple[Item, str]] = []
    for item in batch:
        try:
            rows.append(_prepared(encoder, item.load()))
            good.append(item)
        except DataError as error:
            rejected.append((item, str(error)))
    if not good:
        return Batch(index, np.zeros((0, encoder.dimension), np.float32), (), tuple(rejected))
    prepared = np.zeros((encoder.batch_size, *rows[0].shape), dtype=rows[0].dtype)
    for position, row in enumerate(rows):
        prepared[position] = row
    with forward_slots:
        embeddings = encoder.forward(prepared)[: len(good)]
    usable = [bool(np.isfinite(row).all() and row.any()) for row in embeddings]
    reason = "the encoder gave values that are not finite, or all zero"
    rejected += [(item, reason) for item, fine in zip(good, usable, strict=True) if not fine]
    kept = tuple(item for item, fine in zip(good, usable, strict=True) if fine)
    return Batch(index, np.ascontiguousarray(embeddings[usable]), kept, tuple(rejected))


def _prepared(encoder: Encoder, image: NDArray[np.uint8]) -> NDArray[Any]:
    """Prepare one image; whatever a foreign processor raises over it costs this image alone."""
    try:
        return encoder.prepare(image)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"the encoder can't prepare it ({type(error).__name__}: {reason})") from None


def _cut(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
