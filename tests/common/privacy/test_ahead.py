"""Normals drawn ahead by a thread: the source's own, in its order, each handed out once."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.privacy.ahead import DrawnAhead, drawn_ahead, numbers_in
from common.privacy.mechanism import add_gaussian
from common.privacy.noise import SecureNoise, TestNoise

DRAWS = ((6, 1.0), (0, 1.0), (5, 2.0), (7, 0.0))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


class Watched(TestNoise):
    """Which threads drew."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.threads: list[str] = []

    def gaussian(self, shape: int | tuple[int, ...], std: float) -> np.ndarray:
        self.threads.append(threading.current_thread().name)
        return super().gaussian(shape, std)


def test_numbers_are_the_sources_own_in_their_order_and_each_is_handed_out_once(pool: ThreadPoolExecutor) -> None:
    source, alone = Watched(3), TestNoise(3)
    ahead = DrawnAhead(source, pool, DRAWS)
    # two tiles of the first draw, the second whole, and what was not planned
    for shape, std in (((2, 1, 2), 1.0), ((2,), 1.0), (5, 2.0), (4, 2.0), ((1, 3), 1.0)):
        np.testing.assert_array_equal(ahead.gaussian(shape, std), alone.gaussian(shape, std))
    assert threading.current_thread().name not in source.threads[:2]
    assert source.threads[2:] == [threading.current_thread().name] * 2
    np.testing.assert_array_equal(ahead.uniform(3), alone.uniform(3))
    np.testing.assert_array_equal(ahead.exact_gaussian(np.ones(3), 2.0), alone.exact_gaussian(np.ones(3), 2.0))
    assert (ahead.name, ahead.certified) == ("test", False)


def test_whatever_is_asked_no_number_comes_twice(pool: ThreadPoolExecutor) -> None:
    """More than is left, another standard deviation, nothing: what was drawn for other requests is thrown away."""
    for asked in ([(4, 1.0), (4, 1.0), (5, 1.0)], [(5, 2.0), (6, 1.0), (5, 2.0)], [(0, 1.0), (6, 1.0), (6, 1.0)]):
        ahead = DrawnAhead(SecureNoise(), pool, DRAWS)
        seen = np.concatenate([ahead.gaussian(size, std) / std for size, std in asked])
        assert len(set(seen.tolist())) == sum(size for size, _ in asked)


def test_two_releases_of_one_source_share_no_noise() -> None:
    source, device = SecureNoise(), torch.device("meta")
    zeros = {"a": torch.zeros(50), "b": torch.zeros(50)}
    noise: list[float] = []
    for _ in range(2):
        with drawn_ahead(source, device, [(100, 1.0), (100, 1.0)]) as drawn:
            for _ in range(2):
                noise += torch.cat(list(add_gaussian(zeros, 1.0, drawn).values())).double().tolist()
    assert len(noise) == 400
    assert len(set(noise)) > 390  # rounded to a grid of 2^-20: two in 400 are alike once in some 100 runs, ten never


def test_a_forked_child_uses_none_of_the_numbers(pool: ThreadPoolExecutor) -> None:
    ahead = DrawnAhead(SecureNoise(), pool, [(16, 1.0)])
    first = ahead.gaussian(8, 1.0)  # the thread is done
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - runs in the child
        os.write(writer, ahead.gaussian(8, 1.0).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        of_child = np.frombuffer(pipe.read())
    assert of_child.shape == (8,)
    assert not set(of_child.tolist()) & {*first.tolist(), *ahead.gaussian(8, 1.0).tolist()}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_numbers_drawn_ahead_refuse_to_be_duplicated(duplicate, pool: ThreadPoolExecutor) -> None:
    ahead = DrawnAhead(TestNoise(0), pool, DRAWS)
    with pytest.raises(TypeError, match="would be used twice"):
        duplicate(ahead)


def test_nothing_is_drawn_ahead_on_the_processor() -> None:
    source = TestNoise(0)
    with drawn_ahead(source, torch.device("cpu"), DRAWS) as drawn:
        assert drawn is source


def test_what_goes_wrong_in_the_thread_is_raised_where_the_numbers_are_asked_for() -> None:
    with (
        pytest.raises(ConfigError, match="standard deviation"),
        drawn_ahead(TestNoise(0), torch.device("meta"), [(3, 1e300)]) as drawn,
    ):
        drawn.gaussian(3, 1e300)


def test_numbers_in_shapes() -> None:
    assert numbers_in({"a": (2, 3), "b": (), "c": (0, 4)}) == 7
