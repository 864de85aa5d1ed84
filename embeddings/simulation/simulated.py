"""The demonstration's embeddings: extracted once from the project's own images, cached, and divided.

`load_pool` goes through the same pipeline as `fedhypevae embed`. Processes that arrive together wait for the
one that extracts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from common.config.federation import FederationConfig
from common.durable import sha256_of
from common.errors import ConfigError, DataError
from common.evaluation.splits import split_site, unit_classes
from embeddings.encoders.efficientnet import offline_identity
from embeddings.simulation.partition import partition_dirichlet, partition_iid
from embeddings.store.file import read_store
from embeddings.store.sets import EmbeddingSet

if TYPE_CHECKING:
    from embeddings.pipeline import Item, Listing

DEMO_FILE = Path(__file__).parents[1] / "demo" / "organamnist6000.npz"
DEMO_DIGEST = "1bb55686287a5ebb3b9f3c62364bf6a7ea22354da30d6298f1dd18a5c6d553ca"
_PUBLIC_SALT = bytes(32)  # the images are public: nothing to hide
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


def cache_folder(home: Path) -> Path:
    """Where the demonstration's embeddings are kept: what FEDHYPEVAE_CACHE names, or outputs/cache in a folder."""
    return home / (os.environ.get("FEDHYPEVAE_CACHE") or "outputs/cache")


def pool_path(cache_dir: Path) -> Path:
    """Return where the pool lies in a cache: its name depends on the images and the encoder."""
    identity = offline_identity(DEMO_CLASSES)
    name = hashlib.sha256(f"{DEMO_DIGEST} {identity.fingerprint()}".encode()).hexdigest()
    return cache_dir / f"{name[:32]}.parquet"


def ensure_pool(cache_dir: Path) -> Path:
    """Return where the demonstration's embeddings are, extracting them on first use.

    Args:
        cache_dir: folder of the cache; made when missing.

    Raises:
        ConfigError: the offline encoder's packages are missing. DataError: the disk is full.
    """
    path = pool_path(cache_dir)
    if not path.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                _extract(path)
    return path


def load_pool(cache_dir: Path) -> EmbeddingSet:
    """Return the demonstration's embeddings: 6,000 rows, 1280-d, 11 classes, no splits, no patients.

    Raises:
        as `ensure_pool`; DataError also where the cached file is damaged.
    """
    return read_store(ensure_pool(cache_dir))


def open_pool(home: Path, federation: FederationConfig) -> EmbeddingSet:
    """The records that a simulation divides: the run's own pool, the first of several, or the demonstration's.

    Args:
        home: folder that the run's paths start from.
        federation: names the pools.

    Raises:
        as `load_pool` and `deal`; DataError also where the named file is missing.
    """
    pools = [read_store(home / pool) for pool in federation.pools]  # all of them, so that a missing one ends here
    for pool in pools:  # as is one with too few records for so many sites
        deal(pool, federation.num_sites, federation.alpha or None, federation.seed)
    return pools[0] if pools else load_pool(cache_folder(home))


def deal(pool: EmbeddingSet, num_sites: int, alpha: float | None, seed: int) -> NDArray[np.int64]:
    """Return which simulated site each row of a pool goes to; a patient's rows go to the same one.

    Args:
        pool: the set to divide.
        num_sites: number of sites, >= 1.
        alpha: Dirichlet concentration over the classes, > 0; None deals the rows out evenly (IID).
        seed: of the partition, >= 0.

    Returns:
        (n,) in 0..num_sites-1.

    Raises:
        ConfigError: a number is out of range. DataError: the pool has fewer patients, or rows, than sites.
    """
    if seed < 0:
        raise ConfigError(f"partition seed: expected 0 or more, found {seed}")
    rng = np.random.default_rng([seed, 0])
    # whole units are dealt out: no patient is at two sites
    units = np.arange(len(pool)) if pool.groups is None else pool.groups
    _, member = np.unique(units, return_inverse=True)
    unit_labels = unit_classes(pool.labels, member)
    if alpha is None:
        parts = partition_iid(unit_labels, num_sites, rng)
    else:
        parts = partition_dirichlet(unit_labels, num_sites, alpha, rng)
    owners = np.empty(unit_labels.size, dtype=np.int64)
    for site_index, part in enumerate(parts):
        owners[part] = site_index
    return owners[member]


def take_site(pool: EmbeddingSet, owners: NDArray[np.int64], site_index: int, seed: int) -> EmbeddingSet:
    """Return one simulated site of a pool, divided into training, validation and test rows.

    Args:
        pool: the set that is divided.
        owners: (n,) from `deal`.
        site_index: which site, >= 0.
        seed: of the split, >= 0; the same at all sites.

    Returns:
        The site's rows with `splits` filled in (64/16/20).
    """
    site = pool.take(np.flatnonzero(owners == site_index))
    splits = split_site(site.labels, np.random.default_rng([seed, 1, site_index]), site.groups)
    return dataclasses.replace(site, splits=splits)


def load_site(pool: EmbeddingSet, site_index: int, num_sites: int, alpha: float | None, seed: int) -> EmbeddingSet:
    """Return one simulated site of a pool: `deal` and `take_site` in one.

    Raises:
        as `deal`; ConfigError also where there is no such site.
    """
    if not 0 <= site_index < num_sites:
        raise ConfigError(f"site index: expected 0..{num_sites - 1}, found {site_index}")
    return take_site(pool, deal(pool, num_sites, alpha, seed), site_index, seed)


def _find_images() -> Path:
    """The images: beside this module, or in the clone that a bare `flwr run .` started from (the app has code only)."""
    home = Path(os.environ.get("FEDHYPEVAE_HOME", "")).resolve()
    for file in (DEMO_FILE, home / "embeddings" / "demo" / DEMO_FILE.name):
        if file.is_file() and sha256_of(file) == DEMO_DIGEST:
            return file
    raise DataError(
        f"{DEMO_FILE}: expected the demonstration's images (SHA-256 {DEMO_DIGEST[:16]}...), found none or others; "
        "start the run in a clone of the project, or `make demo` there once, which fills the cache"
    )


def demo_items() -> dict[bytes, Item]:
    """The demonstration's images by the keys under which the pool holds them."""
    from embeddings.readers.patients import image_key

    return {image_key(_PUBLIC_SALT, *item.stamp): item for item in _listing().items}


def _listing() -> Listing:
    from embeddings.pipeline import Item, Listing

    with np.load(_find_images()) as demo:
        images, labels = demo["images"], demo["labels"].tolist()
    items = tuple(
        Item(f"{DEMO_FILE.name}[{row}]", partial(images.__getitem__, row), label, stamp=(DEMO_FILE.name, row))
        for row, label in enumerate(labels)
    )
    return Listing(items, (), DEMO_CLASSES)


def _extract(path: Path) -> None:
    from embeddings.encoders.base import EncoderOptions
    from embeddings.encoders.efficientnet import EfficientNetLite0
    from embeddings.extract import extract
    from embeddings.progress import progress

    listing = _listing()
    notes = {"images": "OrganAMNIST, MedMNIST v2 (Yang et al. 2023), CC BY 4.0"}
    with progress("Embedding the demonstration's images (once)", len(listing.items)) as advance:
        extract(listing, EfficientNetLite0.load(EncoderOptions()), path, _PUBLIC_SALT, notes=notes, advance=advance)
