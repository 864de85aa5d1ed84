"""The check before a run: do the sites' embeddings mean the same?

Sites tell their encoder's identity and their embedding of the project's canary image. Both describe software, not data.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, MeetingError
from common.names import Task
from common.wire.identity import EncoderIdentity, Mismatch, compare

# Relative distances. Measured between one and two threads, batch sizes and folded weights: below 1e-5; another
# resizing rule gives more than 1e-2.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def encode(embedding: NDArray[np.float32]) -> str:
    """Write an embedding as text (base64 of little-endian float32)."""
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()


def decode(text: str) -> NDArray[np.float32]:
    """Read `encode`'s text; raises `DataError` when it is none."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
    except (binascii.Error, ValueError):
        raise DataError("canary: expected an embedding as base64 text; extract the set again") from None


def compare_canaries(canaries: Mapping[str, NDArray[np.float32]], precision: str) -> tuple[Mismatch, ...]:
    """Find the sites whose canary embedding differs from the others'.

    The reference is the coordinate-wise median over the sites, so that one wrong site does not blame the
    right ones. With two sites that differ, both are named.

    Args:
        canaries: site name -> (d,) embedding.
        precision: arithmetic of the encoder; sets the tolerance.

    Returns:
        One `Mismatch` per site that differs by more than the tolerance; empty when all agree.

    Raises:
        DataError: no sites, or a precision without a tolerance.
    """
    if not canaries or precision not in TOLERANCE:
        known = ", ".join(TOLERANCE)
        raise DataError(f"canaries: expected sites and a precision of {known}; found {precision}")
    widths = [vector.size for vector in canaries.values()]
    width = max(set(widths), key=widths.count)
    fitting = np.stack([vector for vector in canaries.values() if vector.size == width])
    reference = np.median(fitting.astype(np.float64), axis=0)
    scale = max(float(np.linalg.norm(reference)), 1e-12)
    limit = TOLERANCE[precision]
    found = []
    for site, vector in canaries.items():
        if vector.size != width:
            found.append(Mismatch(site, "canary embedding", f"{width} values", f"{vector.size} values"))
            continue
        distance = float(np.linalg.norm(vector - reference)) / scale
        if not distance <= limit:
            expected = f"within {limit:g} of each other"
            found.append(Mismatch(site, "canary embedding", expected, f"{distance:.3g} away"))
    return tuple(found)


def same_canary(one: str, other: str, precision: str) -> bool:
    """Tell whether two canaries, as text, agree within the tolerance; an empty one, of an imported set, fits any."""
    found = {"one": one, "other": other}
    return not (one and other) or not compare_canaries({name: decode(found[name]) for name in found}, precision)


class SetFacts(Protocol):
    """What a site may tell of its set: no counts. `canary` is text, empty for an imported set."""

    @property
    def identity(self) -> EncoderIdentity:
        """Encoder, revision, width, preprocessing and class list."""
        ...

    @property
    def task(self) -> Task:
        """What the labels are."""
        ...

    @property
    def canary(self) -> str:
        """The embedding of the project's canary image."""
        ...


def check_sites(
    sites: Mapping[str, SetFacts], *, own_encoders: bool = False, task: Task | None = None
) -> tuple[Mismatch, ...]:
    """Compare what sites know of their sets: encoder, classes, task and canary.

    Args:
        sites: site name -> its facts; a site without a canary is compared by identity alone.
        own_encoders: whether each may have its own encoder; the classes are compared alone then.
        task: of the run; None outside a run, where that of most sites is taken as the right one.

    Returns:
        One `Mismatch` per site and field; empty when the sites agree. Findings may differ: see `all_findings`.

    Raises:
        DataError: no sites, or a canary that can't be read.
    """
    found = compare({site: facts.identity for site, facts in sites.items()})
    if all(facts.task == "multilabel" for facts in sites.values()):  # what a site does not label is unknown there
        found = tuple(mismatch for mismatch in found if mismatch.field != "class_names")
    tasks = [facts.task for facts in sites.values()]
    expected, whose = (max(tasks, key=tasks.count), "the other sites have") if task is None else (task, "the run has")
    other = tuple(Mismatch(site, "task", expected, f.task, whose) for site, f in sites.items() if f.task != expected)
    if other:
        return other
    if own_encoders:
        return tuple(mismatch for mismatch in found if mismatch.field == "class_names")
    vectors = {site: decode(facts.canary) for site, facts in sites.items() if facts.canary}
    if found or len(vectors) < 2:
        return found
    return compare_canaries(vectors, next(iter(sites.values())).identity.precision)


def all_findings(sites: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """What sites that label different findings meet on.

    Args:
        sites: the names of each site's findings.

    Returns:
        The findings of any of them, in the order of their names, and the different sets of them that sites label, by
        number. Where all label the same, those, in their order, and no sets.
    """
    own = [tuple(names) for names in sites]
    if len(set(own)) == 1:
        return own[0], ()
    names = tuple(sorted({name for one in own for name in one}))
    sets = {tuple(place for place, name in enumerate(names) if name in set(one)) for one in own}
    return names, tuple(sorted(sets)) if sets != {tuple(range(len(names)))} else ()


def require_agreement(sites: Mapping[str, SetFacts], *, own_encoders: bool = False, task: Task | None = None) -> None:
    """Refuse to go on when sites differ (see `check_sites`); raises `MeetingError` naming each site and field."""
    found = check_sites(sites, own_encoders=own_encoders, task=task)
    if found:
        raise MeetingError("the sites' embeddings differ: " + "; ".join(str(mismatch) for mismatch in found))
