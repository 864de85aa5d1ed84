"""Pictures of embedding sets, as PNG bytes: class balance, norms, two dimensions, and who has what."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.plain import plain
from embeddings.store.sets import EmbeddingSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 4_000
_DPI = 110


def class_balance(counts: Sequence[int], names: Sequence[str]) -> bytes:
    """Draw records per class as bars; returns a PNG."""
    figure = _figure(7.0, max(1.5, 0.32 * len(names) + 0.8))
    axes = figure.add_subplot()
    axes.barh(range(len(names)), counts, color="#3b6ea5")
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("records")
    return _png(figure)


def norm_histogram(embeddings: NDArray[np.float32]) -> bytes:
    """Draw the distribution of the embeddings' lengths; returns a PNG."""
    figure = _figure(7.0, 2.6)
    axes = figure.add_subplot()
    norms = np.linalg.norm(embeddings[np.isfinite(embeddings).all(axis=1)], axis=1)
    axes.hist(norms, bins=60, color="#3b6ea5")
    axes.set_xlabel("norm of the embedding")
    axes.set_ylabel("records")
    return _png(figure)


def two_dimensions(data: EmbeddingSet, rng: np.random.Generator) -> bytes:
    """Draw at most 4,000 records on their two main components, coloured by class; returns a PNG."""
    finite = np.flatnonzero(np.isfinite(data.embeddings).all(axis=1))
    rows = np.sort(rng.permutation(finite)[:_POINTS])
    values = data.embeddings[rows].astype(np.float64)
    values -= values.mean(axis=0) if len(rows) else 0.0
    figure = _figure(7.0, 5.0)
    axes = figure.add_subplot()
    if len(rows) > 2 and values.shape[1] > 1:
        _, vectors = np.linalg.eigh(values.T @ values)
        points = values @ vectors[:, :-3:-1]
        for label, name in enumerate(data.metadata.class_names):
            chosen = data.labels[rows] == label
            x, y = points[chosen, 0], points[chosen, 1]
            axes.scatter(x, y, s=4, color=_colour(label), label=plain(name), linewidths=0)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=3, frameon=False, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    return _png(figure)


def who_has_what(table: NDArray[np.int64], sites: Sequence[str], names: Sequence[str]) -> bytes:
    """Draw the records of each class at each site as stacked bars.

    Args:
        table: (sites, classes) counts.
        sites: names of the rows.
        names: names of the classes.

    Returns:
        A PNG.
    """
    figure = _figure(8.5, max(2.0, 0.4 * len(sites) + 1.0))
    axes = figure.add_subplot()
    left = np.zeros(len(sites))
    for label, name in enumerate(names):
        axes.barh(range(len(sites)), table[:, label], left=left, color=_colour(label), label=plain(name))
        left += table[:, label]
    axes.set_yticks(range(len(sites)), [plain(site) for site in sites])
    axes.invert_yaxis()
    axes.set_xlabel("records")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return _png(figure)


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
