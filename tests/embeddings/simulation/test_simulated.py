from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from common.wire.identity import EncoderIdentity
from embeddings.demo.draw import draw, stratified_rows
from embeddings.simulation import simulated
from embeddings.store.sets import EmbeddingSet, SetMetadata

SHARED = Path(os.environ.get("FEDHYPEVAE_SHARED", Path(__file__).parents[4] / "shared"))


@pytest.fixture
def pool(rng: np.random.Generator) -> EmbeddingSet:
    identity = EncoderIdentity("enc", "1", 3, "", "", "float32", ("a", "b", "c", "d"))
    labels = rng.integers(0, 4, 400)
    return EmbeddingSet(rng.standard_normal((400, 3)).astype(np.float32), labels, SetMetadata(identity))


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_load_site_sites_are_disjoint_and_complete(pool: EmbeddingSet, alpha: float | None) -> None:
    sites = [simulated.load_site(pool, index, 5, alpha, seed=1) for index in range(5)]
    rows = np.concatenate([site.embeddings for site in sites])
    assert len(rows) == len(pool)
    assert {row.tobytes() for row in rows} == {row.tobytes() for row in pool.embeddings}
    for site in sites:
        assert site.splits is not None
        assert {"train", "test"} <= set(site.splits)
        assert site.metadata.class_counts == tuple(np.bincount(site.labels, minlength=4))


def test_load_site_depends_on_seed_only(pool: EmbeddingSet) -> None:
    one, again, other = (simulated.load_site(pool, 2, 4, 0.5, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.embeddings, again.embeddings)
    np.testing.assert_array_equal(one.splits, again.splits)
    assert one.embeddings.shape != other.embeddings.shape or not np.array_equal(one.embeddings, other.embeddings)


def test_load_site_refuses_numbers_out_of_range(pool: EmbeddingSet) -> None:
    with pytest.raises(ConfigError, match=r"0\.\.3, found 4"):
        simulated.load_site(pool, 4, 4, None, 0)
    with pytest.raises(ConfigError, match="seed"):
        simulated.load_site(pool, 0, 4, None, -1)


def test_demo_file_is_the_one_named_in_the_code() -> None:
    content = simulated.DEMO_FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() == simulated.DEMO_DIGEST
    assert len(content) < 5_000_000
    with np.load(simulated.DEMO_FILE) as demo:
        assert demo["images"].shape == (6000, 28, 28)
        assert demo["images"].dtype == np.uint8
        counts = np.bincount(demo["labels"])
    assert counts.size == len(simulated.DEMO_CLASSES)
    assert counts.min() > 200


def test_stratified_rows_keeps_shares(rng: np.random.Generator) -> None:
    labels = np.repeat([0, 1, 2], [700, 250, 50])
    rows = stratified_rows(labels, 100, rng)
    assert len(set(rows)) == 100
    np.testing.assert_array_equal(np.bincount(labels[rows]), [70, 25, 5])


@pytest.mark.slow
def test_draw_reproduces_the_demo_file_byte_for_byte(tmp_path: Path) -> None:
    source = SHARED / "data" / "organamnist.npz"
    if not source.is_file():
        pytest.skip(f"{source} is not here")
    draw(source, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == simulated.DEMO_FILE.read_bytes()


def test_load_pool_extracts_once_when_several_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    with np.load(simulated.DEMO_FILE) as demo:
        np.savez(tmp_path / "few.npz", images=demo["images"][:40], labels=demo["labels"][:40])
    monkeypatch.setattr(simulated, "DEMO_FILE", tmp_path / "few.npz")
    digest = hashlib.sha256((tmp_path / "few.npz").read_bytes()).hexdigest()
    monkeypatch.setattr(simulated, "DEMO_DIGEST", digest)
    calls: list[Path] = []
    extract = simulated._extract

    def counted(path: Path) -> None:
        calls.append(path)
        extract(path)

    monkeypatch.setattr(simulated, "_extract", counted)
    pools: list[EmbeddingSet] = []
    threads = [threading.Thread(target=lambda: pools.append(simulated.load_pool(tmp_path / "cache"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(pools) == 3
    assert pools[0].embeddings.shape == (40, 1280)
    np.testing.assert_array_equal(pools[0].embeddings, pools[2].embeddings)


def test_find_images_of_an_installed_app_in_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app that Flower installs has code only: its images are those of the folder where the run was started."""
    clone = simulated.DEMO_FILE.parents[2]
    monkeypatch.setattr(simulated, "DEMO_FILE", tmp_path / simulated.DEMO_FILE.name)
    monkeypatch.setenv("FEDHYPEVAE_HOME", str(clone))
    assert simulated._find_images() == clone / "embeddings" / "demo" / "organamnist6000.npz"


def test_load_pool_without_images_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "DEMO_FILE", tmp_path / "none.npz")
    monkeypatch.setenv("FEDHYPEVAE_HOME", str(tmp_path))
    with pytest.raises(DataError, match="make demo"):
        simulated.load_pool(tmp_path / "cache")


def test_load_site_keeps_a_patient_at_one_site(rng: np.random.Generator, pool: EmbeddingSet) -> None:
    grouped = dataclasses.replace(pool, groups=rng.integers(0, pool.labels.size // 3, pool.labels.size))
    for alpha in (None, 0.5):
        sites = [simulated.load_site(grouped, index, 4, alpha, 7) for index in range(4)]
        assert sum(site.labels.size for site in sites) == pool.labels.size
        patients = [set(np.asarray(site.groups).tolist()) for site in sites]
        assert sum(map(len, patients)) == len(set.union(*patients))
