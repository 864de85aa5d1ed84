"""In which order slices lie: along the normal of their plane, by their numbers, or by their names.

Source: DICOM PS3.3 C.7.6.2.1.1 (plane), C.7.6.16.2.3-4 (planes of frames).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_SAME_PLANE = 0.01  # most by which cosines of an orientation differ in one series; a tilt of a degree is 0.02
_DECIMALS = 3  # of a position in mm: the rest is rounding


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """What a slice says of its place: `position` (3,), `orientation` (6,) and `location` in mm, and a number."""

    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    location: float | None = None
    number: int | None = None


NO_PLACE = Slice()


def slice_of(dataset: Any) -> Slice:
    """The place of a file of one frame; what can't be read is left out."""
    location, number = _numbers(dataset, "SliceLocation", 1), _numbers(dataset, "InstanceNumber", 1)
    return Slice(
        _numbers(dataset, "ImagePositionPatient", 3),
        _numbers(dataset, "ImageOrientationPatient", 6),
        None if location is None else location[0],
        None if number is None else int(number[0]),
    )


def in_order(slices: Sequence[Slice], names: Sequence[str]) -> list[int]:
    """The numbers of slices, in order.

    By the position along their common normal where every slice has one, else by their locations. Slices of one place,
    and others, by their instance numbers where every slice has one, and by their names, whose digits are numbers.

    Args:
        slices: of one series.
        names: of their files.
    """
    along = _along(slices) or [0.0] * len(slices)
    numbers = [one.number for one in slices]
    known = [0 if number is None or None in numbers else number for number in numbers]
    return sorted(range(len(slices)), key=lambda row: (along[row], known[row], natural(names[row])))


def middle_frame(dataset: Any, frames: int) -> int:
    """The frame in the middle: along the normal where every frame has a position, else by number."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    if len(per_frame) != frames:
        return frames // 2
    slices = [
        Slice(
            _numbers(_group((groups,), "PlanePositionSequence"), "ImagePositionPatient", 3),
            _numbers(_group((groups, *shared[:1]), "PlaneOrientationSequence"), "ImageOrientationPatient", 6),
            number=number,
        )
        for number, groups in enumerate(per_frame)
    ]
    return in_order(slices, [""] * frames)[frames // 2]


def natural(name: str) -> list[str | int]:
    """A key by which names are ordered with their digits as numbers: IM2 before IM10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def _along(slices: Sequence[Slice]) -> list[float] | None:
    """Places along the normal in mm; None where slices have neither positions in a common plane nor locations."""
    if all(one.position is not None and one.orientation is not None for one in slices):
        planes = np.asarray([one.orientation for one in slices])
        if np.abs(planes - planes[0]).max() <= _SAME_PLANE:
            normal = np.cross(planes[0, :3], planes[0, 3:])
            return [round(float(np.dot(one.position, normal)), _DECIMALS) for one in slices if one.position is not None]
    locations = [one.location for one in slices if one.location is not None]
    return locations if len(locations) == len(slices) else None


def _group(groups: Sequence[Any], keyword: str) -> Any:
    """The item of a functional group, from the first of several places."""
    return next((place.get(keyword)[0] for place in groups if place.get(keyword)), {})


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """So many finite numbers; None where an attribute holds anything else."""
    try:
        value = dataset.get(keyword)
        found = np.asarray(value if count > 1 else [value], dtype=np.float64)
    except Exception:  # whatever stands there costs no file: there are other ways to order
        return None
    return tuple(found.tolist()) if found.shape == (count,) and np.isfinite(found).all() else None
