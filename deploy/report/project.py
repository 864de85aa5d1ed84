"""Embeddings in two dimensions: the plane of the class means, the main components, and UMAP where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Points = NDArray[np.float64]
Projection = Callable[[Rows], Points]
_KEPT = 50


def main_components(values: Rows, count: int = 2) -> Projection:
    """The map (n, d) -> (n, count) to the main components of `values`; missing dimensions are zero."""
    mean = values.mean(axis=0, dtype=np.float64)
    width = values.shape[1]
    spread = np.cov(values.astype(np.float64), rowvar=False) if len(values) > 1 else np.zeros((width, width))
    _, vectors = np.linalg.eigh(spread.reshape(width, width))
    axes = vectors[:, ::-1][:, :count]
    # a sign that does not depend on the library: the largest entry of an axis is positive
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    axes = np.pad(axes, ((0, 0), (0, count - axes.shape[1])))

    def project(rows: Rows) -> Points:
        points: Points = (rows.astype(np.float64) - mean) @ axes
        return points

    return project


def class_plane(values: Rows, labels: NDArray[np.int64]) -> Projection:
    """The map to the plane in which the classes' means lie farthest apart.

    The main components would not do for a private set: its noise has no direction, and outweighs the classes.

    Args:
        values: (n, d), n >= 2.
        labels: (n,); with fewer than three classes the main components are taken.
    """
    classes = np.unique(labels)
    if len(classes) < 3 or values.shape[1] < 2:
        return main_components(values)
    middle = values.mean(axis=0, dtype=np.float64)
    means = np.stack([values[labels == label].mean(axis=0, dtype=np.float64) for label in classes]) - middle
    axes = np.linalg.svd(means, full_matrices=False)[2][:2].T

    def project(rows: Rows) -> Points:
        found: Points = (rows.astype(np.float64) - middle) @ axes
        return found

    return project


def has_umap() -> bool:
    """Whether umap-learn is installed; a folder of caches that an uninstall left behind is not."""
    found = importlib.util.find_spec("umap")
    return found is not None and found.origin is not None


def umap_points(values: Rows, seed: int = 0) -> Points:
    """Points (n, 2) that keep neighbours together; distances between far groups mean little.

    Source: McInnes, Healy and Melville 2018.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of one thread whenever it is given a seed
        from umap import UMAP

        reduced = main_components(values, min(_KEPT, values.shape[1]))(values)
        found: Points = UMAP(n_components=2, n_neighbors=min(15, len(values) - 1), random_state=seed).fit_transform(
            reduced
        )
    return found
