"""Divide one set into simulated sites.

All draws come from the generator passed in; the same generator state gives the same parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, DataError

_REDRAWS = 100

Rows = NDArray[np.int64]


def partition_iid(labels: NDArray[np.int64], num_sites: int, rng: np.random.Generator) -> list[Rows]:
    """Deal the rows out at random, in parts whose sizes differ by one at most.

    Args:
        labels: (n,) class of each row.
        num_sites: number of sites, 1..n.
        rng: generator of the draw.

    Returns:
        Per site the row numbers, ascending; together each row once.

    Raises:
        ConfigError: fewer than one site. DataError: fewer rows than sites.
    """
    _check_sites(labels.size, num_sites)
    return [np.sort(part) for part in np.array_split(rng.permutation(labels.size), num_sites)]


def partition_dirichlet(
    labels: NDArray[np.int64], num_sites: int, alpha: float, rng: np.random.Generator
) -> list[Rows]:
    """Divide each class among the sites in shares drawn from a symmetric Dirichlet law; smaller α, more skew.

    A draw that leaves a site without a record is drawn again.

    Args:
        labels: (n,) class of each row.
        num_sites: number of sites, 1..n.
        alpha: concentration, > 0.
        rng: generator of the draw.

    Returns:
        Per site the row numbers, ascending; together each row once; no site is empty.

    Raises:
        ConfigError: α is not positive or there is no site. DataError: fewer rows than sites, or 100 draws in
            a row left a site empty.

    Source: Hsu, Qi and Brown 2019, sec. 3 (class shares per site rather than site shares per class: Yurochkin
        et al. 2019).
    """
    _check_sites(labels.size, num_sites)
    if not (np.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"Dirichlet concentration: expected a number above 0, found {alpha}")
    for _ in range(_REDRAWS):
        parts: list[list[Rows]] = [[] for _ in range(num_sites)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(num_sites, alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * rows.size).astype(np.int64)
            for site, part in enumerate(np.split(rows, cuts)):
                parts[site].append(part)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        if all(part.size for part in joined):
            return joined
    raise DataError(
        f"Dirichlet partition: {_REDRAWS} draws of {labels.size} rows over {num_sites} sites with alpha "
        f"{alpha} each "
        "left a site without a record; use a larger alpha or fewer sites"
    )


def partition_by_column(values: Sequence[str] | NDArray[np.str_]) -> dict[str, Rows]:
    """Make one site of each value of a column, such as the acquisition site.

    Args:
        values: (n,) one text per row.

    Returns:
        Value -> row numbers, ascending; values in alphabetical order.

    Raises:
        DataError: no rows.
    """
    column = np.asarray(values)
    if column.size == 0:
        raise DataError("partition by column: expected at least one row, found none")
    return {str(value): np.flatnonzero(column == value) for value in np.unique(column)}


def partition_by_patient(groups: NDArray[np.int64], num_sites: int, rng: np.random.Generator) -> list[Rows]:
    """Deal whole patients out at random, each to the site with the fewest rows so far.

    Args:
        groups: (n,) patient of each row.
        num_sites: number of sites, 1..number of patients.
        rng: generator of the draw.

    Returns:
        Per site the row numbers, ascending; no patient is at two sites.

    Raises:
        ConfigError: fewer than one site. DataError: fewer patients than sites.
    """
    patients, member = np.unique(groups, return_inverse=True)
    _check_sites(patients.size, num_sites, "patients")
    sizes = np.bincount(member)
    site_of = np.empty(patients.size, dtype=np.int64)
    load = np.zeros(num_sites, dtype=np.int64)
    for patient in rng.permutation(patients.size):
        site = int(np.argmin(load))
        site_of[patient] = site
        load[site] += sizes[patient]
    return [np.flatnonzero(site_of[member] == site) for site in range(num_sites)]


def _check_sites(available: int, num_sites: int, what: str = "rows") -> None:
    if num_sites < 1:
        raise ConfigError(f"number of sites: expected at least 1, found {num_sites}")
    if available < num_sites:
        raise DataError(f"partition: expected at least {num_sites} {what}, one per site; found {available}")
