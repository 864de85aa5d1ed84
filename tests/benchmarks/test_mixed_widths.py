"""Mixed widths: every pair of encoder and architecture once, images encoded once, and a record of a few sites."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import cells, mixed_widths
from benchmarks.protocol import BenchmarkSite, Federation
from benchmarks.rows import ROWS
from benchmarks.sources import organ_draw
from common.records import SiteData
from embeddings.encoders import efficientnet

_COLUMNS = ("personal", "local_linear", "local_same")


def test_twelve_sites_have_every_pair_of_encoder_and_architecture_once() -> None:
    pairs = {(mixed_widths.encoder_of(at), mixed_widths.architecture_of(at)) for at in range(mixed_widths.NUM_SITES)}
    assert len(pairs) == mixed_widths.NUM_SITES == 12


def test_images_are_those_of_the_rows_and_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"train": 20_000, "val": 4_000, "test": 6_000}
    total, first = sum(counts.values()), 0
    stored = {}
    for split, count in counts.items():  # each image says which row of the file it is
        numbers = np.arange(first, first + count, dtype=np.int64)
        stored[f"{split}_images"] = np.stack([numbers // 256, numbers % 256], 1).astype(np.uint8).reshape(-1, 1, 2)
        first += count
    np.savez(tmp_path / "organamnist.npz", **stored)
    encoded: list[int] = []

    class Encoder:
        def embed(self, batch: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
            numbers = [256 * int(image[0, 0]) + int(image[0, 1]) for image in batch]
            encoded.extend(numbers)
            rows = np.zeros((len(batch), 1280), dtype=np.float32)
            rows[np.arange(len(batch)), [number % 1280 for number in numbers]] = 3.0
            return rows

    monkeypatch.setattr(efficientnet.EfficientNetLite0, "load", staticmethod(lambda options: Encoder()))
    cache, wanted = tmp_path / "cache" / "rows.npz", np.array([5, 2, 9])
    found = mixed_widths.encoded_images(wanted, tmp_path, cache)
    drawn = organ_draw(total)[wanted]
    assert found.argmax(1).tolist() == (drawn % 1280).tolist()
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0)
    assert sorted(encoded) == sorted(drawn.tolist())
    again = mixed_widths.encoded_images(np.array([9, 7, 5]), tmp_path, cache)
    assert np.array_equal(again[[2, 0]], found[[0, 2]])
    assert len(encoded) == 4


@pytest.mark.parametrize("method", mixed_widths.METHODS)
def test_a_record_of_sites_with_different_widths(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)

    def rows(count: int, width: int) -> SiteData:
        labels = torch.arange(count) % 3
        return SiteData(torch.eye(3, width)[labels] + 0.2 * torch.randn(count, width, generator=generator), labels)

    widths = (6, 9, 4, 6)
    sites = tuple(
        BenchmarkSite(f"site-{at}", rows(30, width), rows(6, width), rows(15, width)) for at, width in enumerate(widths)
    )
    monkeypatch.setattr(
        mixed_widths, "mixed_federation", lambda seed, folder: Federation("m", seed, ("a", "b", "c"), sites)
    )
    monkeypatch.setattr(mixed_widths, "data_folder", lambda: Path())
    row = next(row for row in ROWS if row.method == method)
    small = replace(row, settings={**row.settings, "num-rounds": 2, "chunk-size": 40})
    monkeypatch.setattr(mixed_widths, "ROWS", (small,))
    monkeypatch.setattr(cells, "_TUNING_EPOCHS", 1)
    record = mixed_widths.measure(7, method)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [site["train_rows"] for site in record["sites"]] == [30] * 4
    assert all(0 <= value <= 1 for site in record["sites"] for name in _COLUMNS for value in site[name])


def test_rendering_takes_means_over_sites_then_seeds() -> None:
    def record(seed: int, balanced: float) -> dict[str, Any]:
        sites = [
            {"encoder": "sscd", "architecture": "linear", "personal": [0.9, value], "local_linear": [0.8, 0.5],
             "local_same": [0.8, 0.6]}
            for value in (balanced, balanced + 0.2)
        ]  # fmt: skip
        return {"method": "mh_pfedhn", "seed": seed, "sites": sites}

    text = mixed_widths.render([record(1, 0.5), record(2, 0.7)])
    assert "| mh_pfedhn | linear | 90.0/70.0 (14.1) | 80.0/50.0 (0.0) | 80.0/60.0 (0.0) | +20.0 | 2 |" in text


def test_kept_results_show_that_sites_of_mixed_widths_gain_from_each_other() -> None:
    path = mixed_widths.RESULTS / "mixed_widths.json"
    if not path.is_file():
        pytest.skip("no results/mixed_widths.json: run make bench-widths")
    records = [one for one in json.loads(path.read_text(encoding="utf-8")) if one["method"] == "mh_pfedhn"]
    assert len({one["seed"] for one in records}) >= 3
    sites = [site for one in records for site in one["sites"]]
    assert {site["width"] for site in sites} == set(mixed_widths.ENCODERS.values())
    for name in {site["architecture"] for site in sites}:
        mine = [site for site in sites if site["architecture"] == name]
        shared, alone = (sum(site[column][1] for site in mine) for column in ("personal", "local_same"))
        assert shared > alone, name
