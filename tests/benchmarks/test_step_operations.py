"""What a private step asks of a GPU: as many operations at every size of a tile, few more than the plain step, and no
answer. Units beyond the first 4,096 rows cost as many again for each tile. Adding the noise waits once, at the end, and
is not counted.

Counted on torch's `meta` device, which runs every operation that a GPU would and holds no numbers: one that waits for
an answer fails there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_ways import DECODERS, Way, build_ways
from common.devices import computing_on
from common.privacy.clipping import MOST_ROWS

BATCHES = (64, 1613, 4096)
# these write no number: another view of the same ones, memory that is not filled, a copy from the host's own memory
_NO_KERNEL = frozenset({
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unsqueeze", "view",
})  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts what would be at least one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in _NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operations(way: Way) -> Counter[str]:
    way()  # what is made once is made
    with Operations() as seen:
        way()
    return seen.counts


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_private_step_is_as_many_operations_at_every_size_and_few_more_than_the_plain_one(decoder: str) -> None:
    private, plain = [], []
    for batch in BATCHES:
        with computing_on(torch.device("meta")):
            ways = build_ways(batch, 768, decoder).ways
            private.append(operations(ways["private"]))
            plain.append(operations(ways["plain"]))
    assert private[0] == private[1] == private[2]
    assert plain[0] == plain[1] == plain[2]
    assert private[0].total() <= 1.5 * plain[0].total()


def test_a_tile_more_costs_what_the_first_does_and_the_addition_of_its_sums() -> None:
    with computing_on(torch.device("meta")):
        one, two, three = (
            operations(build_ways(tiles * MOST_ROWS, 768, "small").ways["private"]).total() for tiles in (1, 2, 3)
        )
    assert three - two <= two - one <= 1.25 * one


def test_an_operation_more_is_counted() -> None:
    """The count sees what it should: an elementwise product, but no view."""
    numbers = torch.ones(3, 4, device="meta")
    assert operations(lambda: numbers.T[0] * 2.0) == {"mul": 1}
    with pytest.raises(RuntimeError, match="meta"):
        operations(lambda: bool((numbers > 0).all()))
