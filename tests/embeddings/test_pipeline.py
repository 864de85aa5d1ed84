from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import DataError
from embeddings.encoders.base import EncoderOptions
from embeddings.encoders.load import load_encoder
from embeddings.pipeline import Item, embed_batches


def _items(count: int, bad: frozenset[int] = frozenset()) -> Iterator[Item]:
    def load(number: int) -> np.ndarray:
        if number in bad:
            raise DataError(f"{number}: broken")
        return np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)

    for number in range(count):
        yield Item(str(number), lambda number=number: load(number), number)


def test_embed_batches_keeps_order_and_equals_one_by_one(tiny_dinov2: Path) -> None:
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=4))
    batches = list(embed_batches(_items(18), encoder, workers=3))
    assert [batch.index for batch in batches] == [0, 1, 2, 3, 4]
    assert [item.label for batch in batches for item in batch.items] == list(range(18))
    found = np.concatenate([batch.embeddings for batch in batches])
    expected = encoder.embed([item.load() for item in _items(18)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_embed_batches_bits_depend_on_no_neighbour_and_no_worker_count(tiny_dinov2: Path) -> None:
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=4))
    whole = {
        item.label: row.tobytes()
        for batch in embed_batches(_items(18), encoder, workers=1)
        for item, row in zip(batch.items, batch.embeddings, strict=True)
    }
    bad = frozenset({0, 5, 6, 7, 17})
    batches = list(embed_batches(_items(18, bad), encoder, workers=3))
    rejected = [(item.label, reason) for batch in batches for item, reason in batch.rejected]
    assert rejected == [(number, f"{number}: broken") for number in sorted(bad)]
    for batch in batches:
        for item, row in zip(batch.items, batch.embeddings, strict=True):
            assert row.tobytes() == whole[item.label]


def test_embed_batches_of_bad_images_only(tiny_dinov2: Path) -> None:
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=4))
    (batch,) = embed_batches(_items(3, frozenset(range(3))), encoder)
    assert batch.embeddings.shape == (0, 32)
    assert len(batch.rejected) == 3


def test_embed_batches_reads_a_bounded_number_ahead(tiny_dinov2: Path) -> None:
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=2))
    taken = itertools.count()
    last = 0

    def counted() -> Iterator[Item]:
        nonlocal last
        for item in _items(500):
            last = next(taken)
            yield item

    batches = embed_batches(counted(), encoder, workers=2)
    next(batches)
    assert last < 20
    batches.close()  # type: ignore[attr-defined]
    assert last < 20


def test_embed_batches_restores_torchs_threads_and_passes_errors_on(tiny_dinov2: Path) -> None:
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=2))
    before = torch.get_num_threads()

    def broken() -> np.ndarray:
        raise RuntimeError("a fault of the program is no bad image")

    with pytest.raises(RuntimeError, match="a fault of the program"):
        list(embed_batches([Item("x", broken, 0)], encoder))
    assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embed")]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_embed_batches_rejects_rows_that_are_no_embedding(
    tiny_dinov2: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    encoder = load_encoder(str(tiny_dinov2), EncoderOptions(batch_size=2))
    forward = encoder.forward

    def second_is_none(_: object, prepared: np.ndarray) -> np.ndarray:
        rows = forward(prepared).copy()
        rows[1] = value
        return rows

    monkeypatch.setattr(type(encoder), "forward", second_is_none)
    (batch,) = embed_batches(_items(2), encoder)
    assert [(item.source, reason) for item, reason in batch.rejected] == [
        ("1", "the encoder gave values that are not finite, or all zero")
    ]
    assert batch.embeddings.shape == (1, encoder.dimension)
