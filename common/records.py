"""A site's records: as they lie there, laid out by unit, and the maps of one record that every method shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from common.errors import DataError


@dataclass(frozen=True)
class SiteData:
    """The embeddings of one site that training may read.

    Attributes:
        embeddings: (n, d_x) float32.
        labels: (n,) int64 class or grade in [0, K); for a multi-label task (n, K) int8, 1 where a finding is present, 0
            where it is absent, -1 where nobody knows.
        groups: (n,) int64 patient of each record, or None: then each record is its own unit.
        label_set: which of the run's public sets of findings this site labels; the others are unknown in each record.
    """

    embeddings: Tensor
    labels: Tensor
    groups: Tensor | None = None
    label_set: int = 0


@dataclass(frozen=True)
class UnitBatch:
    """Records laid out by unit.

    Attributes:
        embeddings: (U, R, d_x), zero where padded.
        labels: (U, R), zero where padded; for a multi-label task (U, R, K) int8, -1 (unknown) where padded.
        mask: (U, R) float, 1 for a record.
        label_set: as in `SiteData`.
    """

    embeddings: Tensor
    labels: Tensor
    mask: Tensor
    label_set: int = 0


def by_unit(data: SiteData, unit: Literal["record", "patient"], num_classes: int) -> SiteData:
    """The data as the promised unit of privacy sees it: patients only where a patient is the unit.

    Args:
        data: the site's records.
        unit: what the guarantee is about.
        num_classes: K.

    Returns:
        The data, without `groups` where a record is the unit, and without records of no class: see `of_known_class`.

    Raises:
        DataError: patients are promised, but the data does not say which patient a record belongs to: clipping
            record by record would not protect a patient.
    """
    if unit == "record":
        data = replace(data, groups=None)
    elif data.groups is None:
        raise DataError("unit is patient, but the records name no patient: add a group column, or set unit to record")
    return of_known_class(data, num_classes)


def of_known_class(data: SiteData, num_classes: int) -> SiteData:
    """The data without records whose label lies outside [0, K), or of whose findings one is not -1, 0 or 1: a rule for
    each record by itself, where torch's own would be an exception that ends the release of all."""
    if data.labels.ndim == 2:
        known = ((data.labels >= -1) & (data.labels <= 1)).all(dim=1)
    else:
        known = (data.labels >= 0) & (data.labels < num_classes)
    if bool(known.all()):
        return data
    groups = None if data.groups is None else data.groups[known.to(data.groups.device)]
    return replace(data, embeddings=data.embeddings[known], labels=data.labels[known], groups=groups)


def cumulative(grades: Tensor, num_grades: int) -> Tensor:
    """Grades as findings that each say "this grade or a higher one".

    Args:
        grades: (n,) integers in [0, K).
        num_grades: K, >= 2.

    Returns:
        (n, K - 1) int8: column k is 1 where the grade is k + 1 or higher, else 0.

    Source: Frank and Hall 2001, sec. 2.
    """
    return (grades[:, None] > torch.arange(num_grades - 1, device=grades.device)).to(torch.int8)


def among_all(labels: Tensor, own: Sequence[str], names: Sequence[str]) -> Tensor:
    """A site's findings among those of a federation: what it does not label is unknown.

    Args:
        labels: (n, K_own) int8.
        own: names of its columns, each of which is in `names`.
        names: of the federation's findings.

    Returns:
        (n, K) int8.
    """
    places = {name: place for place, name in enumerate(names)}
    everything = labels.new_full((len(labels), len(names)), -1)
    everything[:, [places[name] for name in own]] = labels
    return everything


def on_sphere(embeddings: Tensor) -> Tensor:
    """Rows scaled to unit length, zero rows left alone: (..., d) -> (..., d). A map of one record, so it is public."""
    return embeddings / torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True).clamp(min=1e-12)


def unit_length(data: SiteData) -> SiteData:
    """The records as every method takes them: embeddings `on_sphere`."""
    return replace(data, embeddings=on_sphere(data.embeddings))


def clip_to_ball(embeddings: Tensor, radius: float) -> Tensor:
    """Scale rows down to norm at most `radius`: (..., d) -> (..., d). A map of one record."""
    norms = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True).clamp(min=1e-12)
    return embeddings * (radius / norms).clamp(max=1.0)
