"""Decode and embed a stream of images, in order, in constant memory, on all cores.

Each worker takes a batch, has its images decoded and prepared (in processes, where there are many), and then runs the
network: on a CPU one forward pass per core, each on one thread (two passes side by side lose nothing to barriers, and
the result does not depend on the number of cores); on a GPU two, so that one is sent while the other is computed. A
batch is always padded to its full size, so that a row's value does not depend on how many of its neighbours could be
read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from joblib import cpu_count
from numpy.typing import NDArray

from common.names import Task
from embeddings.decoding import Decoders, Load
from embeddings.encoders.base import Encoder
from embeddings.encoders.preparation import on_device

_FORWARDS_ON_GPU = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image to embed, with its class, or its findings as 1, 0, -1 (present, absent, unknown).

    `source` (file, and frame) and `patient` (as the site names it) are never stored.
    `stamp` is what an image is known by in a second extraction: its path, frame, size and time of change.
    """

    source: str
    load: Load
    label: int | tuple[int, ...]
    patient: str | None = None
    columns: tuple[str, ...] = ()
    split: str | None = None
    stamp: tuple[str | int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a site has to embed: `items` in a fixed order, `rejected` (source, reason) pairs, and remarks.

    `column_names` name each item's `columns`. `rendering` is what the reader was asked to show the files by (a
    DICOM window): a part of the preprocessing that sites compare.
    """

    items: tuple[Item, ...]
    rejected: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...]
    column_names: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    rendering: str = ""
    task: Task = "multiclass"


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch done: `embeddings` (k, d) of the `items` that could be read, and the others with why.

    `shallow` are items of 16 bits that use 12 at most, and so are nearly black.
    """

    index: int
    embeddings: NDArray[np.float32]
    items: tuple[Item, ...]
    rejected: tuple[tuple[Item, str], ...]
    shallow: tuple[Item, ...]


def embed_batches(
    items: Iterable[Item], encoder: Encoder, *, workers: int | None = None, processes: int = 1
) -> Iterator[Batch]:
    """Embed items in batches of the encoder's size, in order; decoding overlaps with compute.

    Args:
        items: the images; taken from the iterator a bounded number ahead.
        encoder: the frozen encoder.
        workers: threads; None takes as many as keep the processes, the cores and the GPU at work.
        processes: that read and prepare the images; 1 leaves it to the threads. More need loads that can be pickled.

    Yields:
        One `Batch` per `encoder.batch_size` items. An item whose `load` raises `DataError`, or which
        the encoder can't prepare, is in `rejected`; so is one whose decoder crashes in a process of its own.

    Raises:
        DataError: the processes can't be started any more.
    """
    from common.devices import one_thread  # torch is imported where it is used

    on_cpu = encoder.device == "cpu"
    slots = cpu_count() if on_cpu else _FORWARDS_ON_GPU
    threads = slots + (processes if processes > 1 else 1 if on_cpu else cpu_count())
    threads = threads if workers is None else workers
    forward_slots = threading.Semaphore(slots)
    batches = enumerate(_cut(items, encoder.batch_size))
    with contextlib.ExitStack() as held:
        if on_cpu:
            held.enter_context(one_thread())  # every forward pass on one thread while the pool runs
        decoders = held.enter_context(Decoders(encoder.prepare, processes))
        pool = held.enter_context(ThreadPoolExecutor(threads, "embed"))
        pending: deque[Future[Batch]] = deque()
        try:
            for index, batch in batches:
                pending.append(pool.submit(_embed_batch, index, batch, encoder, decoders, forward_slots))
                if len(pending) > threads + slots:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _embed_batch(
    index: int, batch: Sequence[Item], encoder: Encoder, decoders: Decoders, forward_slots: threading.Semaphore
) -> Batch:
    answers = decoders.read([item.load for item in batch])
    rejected = [(item, answer.reason) for item, answer in zip(batch, answers, strict=True) if answer.row is None]
    shallow = tuple(item for item, answer in zip(batch, answers, strict=True) if answer.shallow)
    good = [item for item, answer in zip(batch, answers, strict=True) if answer.row is not None]
    rows = [answer.row for answer in answers if answer.row is not None]
    if not rows:
        return Batch(index, np.zeros((0, encoder.dimension), np.float32), (), tuple(rejected), shallow)
    prepared = np.zeros((encoder.batch_size, *rows[0].shape), dtype=rows[0].dtype)
    for position, row in enumerate(rows):
        prepared[position] = row
    batch_there = on_device(prepared, encoder.device)  # beside what the device computes
    with forward_slots:
        embeddings = encoder.forward(batch_there)[: len(good)]
    usable = [bool(np.isfinite(row).all() and row.any()) for row in embeddings]
    reason = "the encoder gave values that are not finite, or all zero"
    rejected += [(item, reason) for item, fine in zip(good, usable, strict=True) if not fine]
    kept = tuple(item for item, fine in zip(good, usable, strict=True) if fine)
    return Batch(index, np.ascontiguousarray(embeddings[usable]), kept, tuple(rejected), shallow)


def _cut(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
