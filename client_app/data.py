"""The site's records as training and evaluation read them; validated once a process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.errors import DataError
from common.methods.base import RunContext
from common.sampling import SiteData

if TYPE_CHECKING:
    from embeddings.store import EmbeddingSet

_SPLIT_SEED = 20250211  # of a deployed site's split, where its file has none: public, and the same in every run


@dataclass(frozen=True)
class Simulated:
    """Where a simulated site's records come from: its share of the demonstration's pool."""

    index: int
    num_sites: int
    alpha: float
    seed: int


def load_records(source: Path | Simulated, cache_dir: Path) -> EmbeddingSet:
    """The site's embedding set, with its splits.

    Args:
        source: the site's parquet file, or its place in a simulation.
        cache_dir: where a simulation's pool is cached.

    Returns:
        The validated set; `splits` is filled in.

    Raises:
        DataError: the file is missing or damaged, rows are not finite (named by number), labels lie outside the class
            set, or there is no record.
    """
    if isinstance(source, Simulated):
        return _simulated(source, cache_dir)
    if not source.is_file():
        raise DataError(f"no embeddings at {source}: make them with `fedhypevae embed`")
    return _stored(source, source.stat().st_mtime_ns)


def split_data(records: EmbeddingSet, name: str, unit: str) -> SiteData:
    """One split as tensors: "train", "validation" or "test".

    Args:
        records: the site's set.
        name: the split.
        unit: "patient" keeps the groups; "record" drops them.

    Raises:
        DataError: patients are the unit but the file has no patient column; or a row is all zero.
    """
    part = records.split(name)
    if unit == "patient" and part.groups is None:
        raise DataError("the run protects patients, but the site's file has no patient column: embed with --patient")
    zero = np.flatnonzero(~part.embeddings.any(axis=1))
    if len(zero):
        raise DataError(
            f"embeddings must not be all zero, found {len(zero)} such rows, first at row {zero[0]} of {name}"
        )
    groups = torch.from_numpy(np.asarray(part.groups)) if unit == "patient" else None
    return SiteData(torch.from_numpy(part.embeddings), torch.from_numpy(part.labels), groups)


def check_matches(records: EmbeddingSet, context: RunContext) -> None:
    """Refuse records that are not what the run is about (DataError): another width or class set."""
    if records.dimension != context.problem.dim:
        raise DataError(f"the run has embeddings of width {context.problem.dim}, this site's have {records.dimension}")
    if records.metadata.class_names != context.problem.class_names:
        raise DataError("the run has another class set than this site's file: embed with the federation's class list")


@lru_cache(maxsize=4)
def _stored(path: Path, modified: int) -> EmbeddingSet:
    del modified  # part of the key: a changed file is read again
    from embeddings.partition import split_site
    from embeddings.store import read_store

    records = read_store(path)
    if records.splits is not None:
        return records
    import dataclasses

    splits = split_site(records.labels, np.random.default_rng(_SPLIT_SEED), records.groups)
    return dataclasses.replace(records, splits=splits)


@lru_cache(maxsize=8)
def _simulated(source: Simulated, cache_dir: Path) -> EmbeddingSet:
    from embeddings.simulated import load_pool, load_site

    alpha = source.alpha if source.alpha > 0 else None
    return load_site(load_pool(cache_dir), source.index, source.num_sites, alpha, source.seed)
