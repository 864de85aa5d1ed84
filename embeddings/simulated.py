"""The demonstration's embeddings: extracted once from the project's own images, cached, and divided.

`load_pool` goes through the same pipeline as `fedhypevae embed`. Processes that arrive together wait for the
one that extracts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from common.errors import ConfigError
from embeddings.efficientnet import file_digest, offline_identity
from embeddings.identity import EncoderIdentity
from embeddings.partition import partition_dirichlet, partition_iid, split_site
from embeddings.store import EmbeddingSet, SetMetadata, read_store, write_store

DEMO_FILE = Path(__file__).parent / "demo" / "organamnist6000.npz"
DEMO_CLASSES = (
    "bladder",
    "femur-left",
    "femur-right",
    "heart",
    "kidney-left",
    "kidney-right",
    "liver",
    "lung-left",
    "lung-right",
    "pancreas",
    "spleen",
)


def pool_path(cache_dir: Path) -> Path:
    """Return where the pool lies in a cache: its name depends on the images and the encoder."""
    identity = offline_identity(DEMO_CLASSES)
    name = hashlib.sha256(f"{file_digest(DEMO_FILE)} {identity.fingerprint()}".encode()).hexdigest()
    return cache_dir / f"{name[:32]}.parquet"


def load_pool(cache_dir: Path) -> EmbeddingSet:
    """Return the demonstration's embeddings, extracting them on first use.

    Args:
        cache_dir: folder of the cache; made when missing.

    Returns:
        6,000 rows, 1280-d, 11 classes, no splits, no patients.

    Raises:
        ConfigError: the offline encoder's packages are missing. DataError: the cached file is damaged, or the
            disk is full.
    """
    path = pool_path(cache_dir)
    if not path.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                write_store(path, _extract())
    return read_store(path)


def load_site(
    pool: EmbeddingSet, site_index: int, num_sites: int, alpha: float | None, seed: int
) -> EmbeddingSet:
    """Return one simulated site of a pool, divided into training, validation and test rows.

    Args:
        pool: the set to divide; each row goes to exactly one site.
        site_index: 0..num_sites-1.
        num_sites: number of sites, >= 1.
        alpha: Dirichlet concentration over the classes, > 0; None deals the rows out evenly (IID).
        seed: of the partition and the split, >= 0; the same at all sites.

    Returns:
        The site's rows with `splits` filled in (64/16/20).

    Raises:
        ConfigError: a number is out of range. DataError: the pool has fewer rows than sites.
    """
    if not 0 <= site_index < num_sites:
        raise ConfigError(f"site index: expected 0..{num_sites - 1}, found {site_index}")
    if seed < 0:
        raise ConfigError(f"partition seed: expected 0 or more, found {seed}")
    rng = np.random.default_rng([seed, 0])
    if alpha is None:
        parts = partition_iid(pool.labels, num_sites, rng)
    else:
        parts = partition_dirichlet(pool.labels, num_sites, alpha, rng)
    site = pool.take(parts[site_index])
    splits = split_site(site.labels, np.random.default_rng([seed, 1, site_index]), site.groups)
    return dataclasses.replace(site, splits=splits)


def _extract() -> EmbeddingSet:
    from embeddings.encoders import OFFLINE_ENCODER, identity_of, load_encoder
    from embeddings.pipeline import Item, embed_batches
    from embeddings.progress import progress

    with np.load(DEMO_FILE) as demo:
        images, labels = demo["images"], demo["labels"].astype(np.int64)
    items = (
        Item(source=f"{DEMO_FILE.name}[{row}]", load=partial(images.__getitem__, row), label=int(label))
        for row, label in enumerate(labels)
    )
    encoder = load_encoder(OFFLINE_ENCODER)
    parts: list[NDArray[np.float32]] = []
    with progress("Embedding the demonstration's images (once)", len(labels)) as advance:
        for batch in embed_batches(items, encoder):
            parts.append(batch.embeddings)
            advance(len(batch.items))
    identity: EncoderIdentity = identity_of(encoder, DEMO_CLASSES)
    notes = {"images": "OrganAMNIST, MedMNIST v2 (Yang et al. 2023), CC BY 4.0"}
    return EmbeddingSet(np.concatenate(parts), labels, SetMetadata(identity, notes=notes))
