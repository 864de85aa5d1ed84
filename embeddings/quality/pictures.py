"""Pictures of embedding sets, as PNG bytes: class balance, norms, two dimensions, and who has what."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.evaluation.splits import unit_classes
from common.plain import plain
from embeddings.store.sets import EmbeddingSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 4_000
_MOST = 60  # classes or sites that one picture can hold
_IN_LEGEND = 30
_DPI = 110


def class_balance(counts: Sequence[int], names: Sequence[str]) -> bytes:
    """Draw records per class as bars, of the 60 commonest where there are more; returns a PNG."""
    shown = _commonest(np.asarray(counts, dtype=np.int64))
    figure = _figure(7.0, max(1.5, 0.32 * len(shown) + 0.8))
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), [counts[label] for label in shown], color="#3b6ea5")
    axes.set_yticks(range(len(shown)), [plain(names[label]) for label in shown])
    axes.invert_yaxis()
    axes.set_xlabel("records" + _of_how_many(shown, names))
    return _png(figure)


def co_occurrence(counts: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Draw how often findings come together: (K, K) records that have both, as shares of each row's; returns a PNG."""
    shares = counts / np.maximum(np.diag(counts), 1)[:, None]
    side = max(2.5, 0.28 * len(names) + 2.0)
    figure = _figure(side + 1.0, side)
    axes = figure.add_subplot()
    shown = axes.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues")
    labels = [plain(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    figure.colorbar(shown, shrink=0.7)
    return _png(figure)


def norm_histogram(embeddings: NDArray[np.float32]) -> bytes:
    """Draw the distribution of the embeddings' lengths; returns a PNG."""
    figure = _figure(7.0, 2.6)
    axes = figure.add_subplot()
    norms = np.linalg.norm(embeddings[np.isfinite(embeddings).all(axis=1)].astype(np.float64), axis=1)
    low, high = norms.min(initial=np.inf), norms.max(initial=0.0)
    narrow = bool(high - low < 1e-9 * high)  # no float lies between 60 bins
    axes.hist(norms, bins=60, range=(0.0, 2.0 * high) if narrow else None, color="#3b6ea5")
    axes.set_xlabel("norm of the embedding")
    axes.set_ylabel("records")
    return _png(figure)


def two_dimensions(data: EmbeddingSet, rng: np.random.Generator) -> bytes:
    """Draw at most 4,000 records on their two main components, coloured by class; returns a PNG."""
    finite = np.flatnonzero(np.isfinite(data.embeddings).all(axis=1))
    rows = np.sort(rng.permutation(finite)[:_POINTS])
    findings = data.metadata.task == "multilabel"
    names = (*data.metadata.class_names, "no finding") if findings else data.metadata.class_names
    values = data.embeddings[rows].astype(np.float64)
    values -= values.mean(axis=0) if len(rows) else 0.0
    figure = _figure(7.0, 5.0)
    axes = figure.add_subplot()
    if len(rows) > 2 and values.shape[1] > 1:
        _, vectors = np.linalg.eigh(values.T @ values)
        points = values @ vectors[:, :-3:-1]
        labels = unit_classes(data.labels[rows], np.arange(len(rows))) if findings else data.labels[rows]
        for label in np.unique(labels).tolist():
            chosen = labels == label
            x, y = points[chosen, 0], points[chosen, 1]
            axes.scatter(x, y, s=4, color=_colour(label), label=_name(names, label), linewidths=0)
        _legend(axes, markerscale=3)
    axes.set_xticks([])
    axes.set_yticks([])
    return _png(figure)


def who_has_what(table: NDArray[np.int64], sites: Sequence[str], names: Sequence[str]) -> bytes:
    """Draw the records of each class at each site as stacked bars: of at most 60 sites, and the 60 commonest classes.

    Args:
        table: (sites, classes) counts.
        sites: names of the rows.
        names: names of the classes.

    Returns:
        A PNG.
    """
    table, sites = table[:_MOST], sites[:_MOST]
    shown = _commonest(table.sum(axis=0))
    figure = _figure(8.5, max(2.0, 0.4 * len(sites) + 1.0))
    axes = figure.add_subplot()
    left = np.zeros(len(sites))
    for label in shown:
        axes.barh(range(len(sites)), table[:, label], left=left, color=_colour(label), label=plain(names[label]))
        left += table[:, label]
    axes.set_yticks(range(len(sites)), [plain(site) for site in sites])
    axes.invert_yaxis()
    axes.set_xlabel("records" + _of_how_many(shown, names))
    _legend(axes)
    return _png(figure)


def _commonest(counts: NDArray[np.int64]) -> list[int]:
    """The classes to draw, in their order: all, or the commonest."""
    return sorted(np.argsort(-counts, kind="stable")[:_MOST].tolist())


def _of_how_many(shown: Sequence[int], names: Sequence[str]) -> str:
    return "" if len(shown) == len(names) else f" (the {len(shown)} commonest of {len(names):,} classes)"


def _name(names: Sequence[str], label: int) -> str:
    return plain(names[label]) if 0 <= label < len(names) else f"no class ({label})"


def _legend(axes: Axes, **more: float) -> None:
    """The classes' names beside a picture; without the later ones where they would not fit on it."""
    handles, names = axes.get_legend_handles_labels()
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "frameon": False, "fontsize": 8}
    axes.legend(handles[:_IN_LEGEND], names[:_IN_LEGEND], **place, **more)


def _colour(label: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    colour = colormaps["tab20"](label % 20)
    return (float(colour[0]), float(colour[1]), float(colour[2]), 1.0)


def _figure(width: float, height: float) -> Figure:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a name with a $ is no formula
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
