"""Normals drawn by a thread while a GPU computes what they will be added to.

How many a step needs, and in which order, is known before it begins. They come from the same source as without the
thread and are the same numbers; each is handed out once. On a processor nothing is drawn ahead: a core that draws
there is one that does not compute, and the sites of a simulation share them all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NoReturn

import torch

from common.privacy.noise import FloatArray, NoiseSource, this_process


@contextmanager
def drawn_ahead(source: NoiseSource, device: torch.device, draws: Sequence[tuple[int, float]]) -> Iterator[NoiseSource]:
    """A source that draws normals ahead where the device is a GPU; the source itself on a processor.

    Args:
        source: where all numbers come from; nothing else may draw from it while this lasts.
        device: what computes meanwhile.
        draws: how many normals of which standard deviation will be asked for, in this order. Other requests are served
            as well, from the source, after these.
    """
    if device.type == "cpu":
        yield source
        return
    with ThreadPoolExecutor(1, "noise") as pool:
        try:
            yield DrawnAhead(source, pool, draws, pinned=device.type == "cuda")
        finally:
            if device.type == "cuda":  # memory that is still copied from must not be written to
                torch.cuda.synchronize(device)


class DrawnAhead:
    """See `drawn_ahead`.

    Args:
        source: where the numbers come from.
        pool: one thread.
        draws: see `drawn_ahead`.
        pinned: whether numbers are laid where a GPU can copy them by itself.
    """

    def __init__(
        self, source: NoiseSource, pool: ThreadPoolExecutor, draws: Sequence[tuple[int, float]], *, pinned: bool = False
    ) -> None:
        self._source, self._pinned, self._process = source, pinned, this_process()
        self.name, self.certified = source.name, source.certified
        planned = [(size, std) for size, std in draws if size > 0 and std > 0]
        # standard deviation of a draw, how many of its numbers were handed out, and the numbers once they are there
        self._left = deque((std, 0, pool.submit(self._draw, size, std)) for size, std in planned)
        self._under_way = [future for _, _, future in self._left]

    def _draw(self, size: int, std: float) -> FloatArray:
        numbers = torch.from_numpy(self._source.gaussian(size, std))
        return (numbers.pin_memory() if self._pinned else numbers).numpy()

    def gaussian(self, shape: int | tuple[int, ...], std: float) -> FloatArray:
        """See `NoiseSource.gaussian`: of what was drawn ahead, the numbers that come next."""
        size = math.prod((shape,) if isinstance(shape, int) else shape)
        if self._process != this_process():  # the process that was forked has these numbers too
            self._left.clear()
            self._under_way.clear()
        if self._left and self._left[0][0] == std:
            _, start, future = self._left.popleft()
            numbers = future.result()
            end = start + size
            if end < len(numbers):
                self._left.appendleft((std, end, future))  # no number is handed out twice
            if end <= len(numbers):
                return numbers[start:end].reshape(shape)
        return self._own().gaussian(shape, std)

    def uniform(self, size: int) -> FloatArray:
        """See `NoiseSource.uniform`."""
        return self._own().uniform(size)

    def exact_gaussian(self, values: FloatArray, std: float) -> FloatArray:
        """See `NoiseSource.exact_gaussian`."""
        return self._own().exact_gaussian(values, std)

    def _own(self) -> NoiseSource:
        """The source, once the thread has left it."""
        wait(self._under_way)
        return self._source

    def __reduce__(self) -> NoReturn:
        raise TypeError("numbers drawn ahead can't be copied or pickled: they would be used twice")


def numbers_in(shapes: Mapping[str, Sequence[int]]) -> int:
    """How many numbers tensors of these shapes hold together."""
    return sum(math.prod(shape) for shape in shapes.values())
