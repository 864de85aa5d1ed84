"""The protocol of the comparison: which records each site has, and which of them train, choose and test.

The partition into sites is drawn once (seed 202502) and is the same for every method and seed; the seed
decides a site's 64/16/20 split, the start of the training and its noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.sources import Pool, data_folder, load_ham, load_heart, load_organ
from common.errors import ConfigError
from common.evaluation.splits import split_site
from common.records import SiteData
from embeddings.simulation.partition import partition_by_column, partition_dirichlet, partition_iid

PARTITION_SEED = 202502
SEEDS = (3407, 12345, 202502)
DATASETS = ("organ-iid", "organ-dir0.3", "organ-small", "ham", "ham-loso", "heart")
ORGAN_SITES = 10
SMALL_SITE_ROWS = 200

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class BenchmarkSite:
    """One site: its records for training, for its own choices, and for the scores.

    `test` is the site's own split, or one set common to all sites (organ-small, ham-loso).
    """

    name: str
    train: SiteData
    validation: SiteData
    test: SiteData


@dataclass(frozen=True)
class Federation:
    """What a method is given: the sites of one data set, divided for one seed.

    `held_out` names the site that is left out (ham-loso), and is None elsewhere.
    """

    dataset: str
    seed: int
    class_names: tuple[str, ...]
    sites: tuple[BenchmarkSite, ...]
    held_out: str | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes, those without a record included."""
        return len(self.class_names)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return int(self.sites[0].train.embeddings.shape[1])


def load_federations(dataset: str, seed: int, folder: Path | None = None) -> tuple[Federation, ...]:
    """The federation of a data set; of `ham-loso` the four that each leave one site out.

    Args:
        dataset: one of `DATASETS`.
        seed: of the splits.
        folder: where the data lies; None is `data_folder()`.

    Raises:
        ConfigError: unknown data set. DataError: the data is not there.
    """
    if dataset not in DATASETS:
        raise ConfigError(f"unknown data set {dataset!r}, expected one of {', '.join(DATASETS)}")
    folder = data_folder() if folder is None else folder
    if dataset == "organ-iid":
        return (organ_federation(load_organ(folder), seed),)
    if dataset == "organ-dir0.3":
        return (organ_federation(load_organ(folder), seed, alpha=0.3),)
    if dataset == "organ-small":
        return (small_federation(load_organ(folder), seed),)
    if dataset == "ham":
        return (real_federation(load_ham(folder), "ham", seed),)
    if dataset == "heart":
        return (real_federation(load_heart(folder), "heart", seed),)
    return leave_one_site_out(load_ham(folder), "ham-loso", seed)


def organ_federation(pool: Pool, seed: int, num_sites: int = ORGAN_SITES, alpha: float | None = None) -> Federation:
    """The pool divided into simulated sites: IID for `alpha` None, else Dirichlet(alpha) over the classes.

    Args:
        pool: rows to divide; each goes to one site.
        seed: of the splits.
        num_sites: number of sites.
        alpha: concentration, > 0, or None.
    """
    rng = np.random.default_rng(PARTITION_SEED)
    if alpha is None:
        parts, name = partition_iid(pool.labels, num_sites, rng), "organ-iid"
    else:
        parts, name = partition_dirichlet(pool.labels, num_sites, alpha, rng), f"organ-dir{alpha:g}"
    sites = tuple(_site(pool, f"site-{at}", rows, seed, at) for at, rows in enumerate(parts))
    return Federation(name, seed, pool.class_names, sites)


def small_federation(
    pool: Pool, seed: int, num_sites: int = ORGAN_SITES, rows_per_site: int = SMALL_SITE_ROWS
) -> Federation:
    """Small sites drawn at random, and all other rows as one test set that the sites share.

    A site's split is 64/16/20 as elsewhere; its own test rows are not used, so that it trains on 128 of 200.
    """
    needed = num_sites * rows_per_site
    if needed >= len(pool.labels):
        raise ConfigError(f"expected fewer than {len(pool.labels)} rows in small sites, found {needed}")
    order = np.random.default_rng(PARTITION_SEED).permutation(len(pool.labels))
    common_test = _take(pool, np.sort(order[needed:]))
    sites = tuple(
        _site(
            pool,
            f"site-{at}",
            np.sort(order[at * rows_per_site : (at + 1) * rows_per_site]),
            seed,
            at,
            common_test,
        )
        for at in range(num_sites)
    )
    return Federation("organ-small", seed, pool.class_names, sites)


def real_federation(pool: Pool, name: str, seed: int) -> Federation:
    """The real sites of a pool; a unit's rows (a lesion's images) are in one split."""
    parts = partition_by_column(_sites_of(pool))
    sites = tuple(_site(pool, site, rows, seed, at) for at, (site, rows) in enumerate(parts.items()))
    return Federation(name, seed, pool.class_names, sites)


def leave_one_site_out(pool: Pool, name: str, seed: int) -> tuple[Federation, ...]:
    """For each real site the federation of the others, all tested on the site left out.

    Units with rows at a training site as well (nine lesions of HAM10000) are taken out of the test.
    """
    parts = partition_by_column(_sites_of(pool))
    folds = []
    for left_out, rows in parts.items():
        others = {site: part for site, part in parts.items() if site != left_out}
        if pool.groups is not None:
            seen = np.unique(pool.groups[np.concatenate(list(others.values()))])
            rows = rows[~np.isin(pool.groups[rows], seen)]
        test = _take(pool, rows)
        numbers = {site: at for at, site in enumerate(parts)}
        sites = tuple(_site(pool, site, part, seed, numbers[site], test) for site, part in others.items())
        folds.append(Federation(name, seed, pool.class_names, sites, held_out=left_out))
    return tuple(folds)


def pooled_training_rows(federation: Federation) -> SiteData:
    """The training rows of all sites in one set: what a centralised, non-private training would see."""
    data = [site.train for site in federation.sites]
    groups = [one.groups for one in data if one.groups is not None]
    return SiteData(
        torch.cat([one.embeddings for one in data]),
        torch.cat([one.labels for one in data]),
        torch.cat(groups) if len(groups) == len(data) else None,
    )


def _site(pool: Pool, name: str, rows: Rows, seed: int, number: int, test: SiteData | None = None) -> BenchmarkSite:
    """A site's three splits, drawn from (seed, number) alone: they do not change when another site does."""
    groups = None if pool.groups is None else pool.groups[rows]
    split = split_site(pool.labels[rows], np.random.default_rng([seed, number]), groups)
    return BenchmarkSite(
        name,
        _take(pool, rows[split == "train"]),
        _take(pool, rows[split == "validation"]),
        _take(pool, rows[split == "test"]) if test is None else test,
    )


def _take(pool: Pool, rows: Rows) -> SiteData:
    return SiteData(
        torch.from_numpy(pool.embeddings[rows]),
        torch.from_numpy(pool.labels[rows]),
        None if pool.groups is None else torch.from_numpy(pool.groups[rows]),
    )


def _sites_of(pool: Pool) -> NDArray[np.str_]:
    if pool.sites is None:
        raise ConfigError("expected a data set with real sites, found none: divide it with organ_federation")
    return pool.sites
