"""The site's records as training and evaluation read them; validated once a process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import DataError
from common.evaluation.splits import split_by_unit
from common.methods.base import Problem, RunContext
from common.records import SiteData, among_all, cumulative, unit_length

if TYPE_CHECKING:
    from embeddings.store.sets import EmbeddingSet, SetMetadata


@dataclass(frozen=True)
class Simulated:
    """Where a simulated site's records come from: its share of a pool.

    Attributes:
        index: which share, 0..num_sites-1.
        num_sites: number of shares.
        alpha: Dirichlet concentration; 0 is an even split.
        seed: of the partition and the split.
        pool: the embedding file that is divided; None for the demonstration's images.
    """

    index: int
    num_sites: int
    alpha: float
    seed: int
    pool: Path | None = None


def read_facts(source: Path | Simulated, cache_dir: Path, unit: str) -> SetMetadata:
    """What a site's file says of itself; no record is read, so whether this fails tells nothing about one.

    Args:
        source: the site's parquet file, or its place in a simulation.
        cache_dir: where a simulation's pool is cached.
        unit: "patient" needs the patients' column.

    Raises:
        DataError: the file is missing, no embedding store, or has no patients where they are the unit.
    """
    from embeddings.store.file import read_head

    path = _pool(source, cache_dir) if isinstance(source, Simulated) else source
    _modified(path)
    metadata, columns = read_head(path)
    if unit == "patient" and "patient" not in columns:
        raise DataError("the run protects patients, but the site's file has no patient column: embed with --patient")
    return metadata


def load_records(source: Path | Simulated, cache_dir: Path) -> EmbeddingSet:
    """The records of a site that can be used, with their splits; no other row has a say in whether one is.

    Args:
        source: the site's parquet file, or its place in a simulation.
        cache_dir: where a simulation's pool is cached.

    Returns:
        The set; `splits` is filled in. It may be empty.

    Raises:
        DataError: the file is missing or damaged. `fedhypevae embed` and `doctor` refuse rows that can't be used.
    """
    if isinstance(source, Simulated):
        return _simulated(source, cache_dir)
    return _stored(source, _modified(source))


def training_data(source: Path | Simulated, cache_dir: Path, context: RunContext) -> SiteData:
    """The records that training may read, as tensors."""
    return split_data(load_records(source, cache_dir), "train", context.config.privacy.unit, context.problem)


def no_data(context: RunContext, site_index: int) -> SiteData:
    """As `training_data`, of a site without a record."""
    none = torch.zeros(0, dtype=torch.long)
    groups = none.clone() if context.config.privacy.unit == "patient" else None
    problem = context.problem
    labels = torch.zeros(0, problem.num_classes, dtype=torch.int8) if problem.findings else none
    return SiteData(torch.zeros(0, context.problem.dim_of(site_index)), labels, groups)


def split_data(records: EmbeddingSet, name: str, unit: str, problem: Problem | None = None) -> SiteData:
    """One split as tensors, embeddings of unit length: "train", "validation" or "test".

    Args:
        records: the site's set.
        name: the split.
        unit: "patient" keeps the groups, which the file must have (`read_facts`); "record" drops them.
        problem: of the run, whose findings may be more than this site's; None takes the site's own.
    """
    part = records.split(name)
    groups = torch.from_numpy(np.asarray(part.groups)) if unit == "patient" else None
    labels = torch.from_numpy(part.labels)
    if part.metadata.task == "ordinal":
        labels = cumulative(labels, part.num_classes)
    own, label_set = part.metadata.class_names, 0
    if part.metadata.task == "multilabel" and problem is not None:
        labels, label_set = among_all(labels, own, problem.class_names), problem.label_set_of(own)
    return unit_length(SiteData(torch.from_numpy(part.embeddings), labels, groups, label_set))


def check_matches(metadata: SetMetadata, context: RunContext, site_index: int) -> None:
    """Refuse a file that is not what the run is about (DataError): of another width, task or class set."""
    expected, found = context.problem.dim_of(site_index), metadata.identity.dimension
    if found != expected:
        raise DataError(f"the run has embeddings of width {expected} here, this site's have {found}")
    if metadata.task != context.problem.task:
        raise DataError(
            f"the run has labels of a {context.problem.task} task, this site's file those of {metadata.task}"
        )
    names = context.problem.class_names
    if metadata.task == "multilabel":
        if not set(metadata.class_names) <= set(names):
            raise DataError("this site's file has findings that the run does not: start a run that meets with them")
    elif metadata.class_names != names:
        raise DataError("the run has another class set than this site's file: embed with the federation's class list")


@lru_cache(maxsize=4)
def _stored(path: Path, modified: int) -> EmbeddingSet:
    del modified
    from embeddings.store.file import read_usable

    records = read_usable(path)
    if records.splits is not None:
        return records
    return dataclasses.replace(records, splits=split_by_unit(records.embeddings, records.groups))


@lru_cache(maxsize=8)
def _simulated(source: Simulated, cache_dir: Path) -> EmbeddingSet:
    from embeddings.simulation.simulated import take_site

    path = _pool(source, cache_dir)
    pool, owners = _dealt(path, _modified(path), source.num_sites, source.alpha, source.seed)
    return take_site(pool, owners, source.index, source.seed)


@lru_cache(maxsize=1)
def _dealt(
    path: Path, modified: int, num_sites: int, alpha: float, seed: int
) -> tuple[EmbeddingSet, NDArray[np.int64]]:
    """A pool, read and divided once a process, which plays many sites: dividing it for each would cost their square."""
    del modified
    from embeddings.simulation.simulated import deal
    from embeddings.store.file import read_usable

    pool = read_usable(path)
    return pool, deal(pool, num_sites, alpha if alpha > 0 else None, seed)


def _pool(source: Simulated, cache_dir: Path) -> Path:
    """The file that a simulation divides; the demonstration's is made on first use."""
    from embeddings.simulation.simulated import ensure_pool

    return ensure_pool(cache_dir) if source.pool is None else source.pool


def _modified(path: Path) -> int:
    """When a file was written: part of a cache's key, so that a changed one is read again."""
    if not path.is_file():
        raise DataError(f"no embeddings at {path}: make them with `fedhypevae embed`")
    return path.stat().st_mtime_ns
