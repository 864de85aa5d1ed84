"""Figures of the report pages: small, so that their text can be read on a telephone; drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embeddings.quality.page import Grid, Picture, data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart, darkened for white paper; then further ones.
COLOURS = (
    *("#0072b2", "#c14c00", "#00785a", "#a6387a", "#6b4fa0", "#8a6d00", "#2a8fbd", "#5b5b5b", "#b3261e", "#3f7d20"),
    *("#7d4a2d", "#1b4d7a", "#c2185b", "#00838f", "#827717", "#5d4037"),
)
_INK, _SOFT, _LINE = "#1d2733", "#4a5666", "#d9dee5"
MARKS = "os^DvPX*<>ph"
_MOST_SITES = 12
_MOST_NAMES = 60
Points = NDArray[np.float64]


def new_figure(width: float = 4.6, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure of so many inches with one quiet pair of axes."""
    from matplotlib import rc_context, rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a name with a $ is no formula
    style = {"font.size": 10.5, "text.color": _INK, "axes.labelcolor": _SOFT, "xtick.color": _SOFT}
    style |= {"ytick.color": _SOFT, "axes.edgecolor": _LINE, "axes.titlesize": 10.5}
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_picture(figure: Figure, title: str, caption: str, alt: str, grid: Grid | None, *, dots: bool = False) -> Picture:
    """The figure as a data URI: lines as SVG, thousands of dots as PNG at twice the resolution."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "fedhypevae"}):
        if dots:
            figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
        else:
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    size = tuple(round(100 * inches) for inches in figure.get_size_inches())
    uri = data_uri(buffer.getvalue(), "png" if dots else "svg+xml")
    return Picture(title, caption, alt, uri, (size[0], size[1]), grid)


def epsilon_curves(history: Sequence[Mapping[str, Any]], target: float | None) -> Picture:
    """ε of each site over the rounds, against the run's limit; equal curves are drawn once."""
    from matplotlib.ticker import MaxNLocator

    rounds = [int(entry["round"]) for entry in history]
    sites = sorted({site for entry in history for site in entry["epsilon"]}, key=natural)
    curves: dict[tuple[float | None, ...], list[str]] = {}
    for site in sites:
        curves.setdefault(tuple(entry["epsilon"].get(site) for entry in history), []).append(site)
    figure, axes = new_figure()
    for index, (curve, names) in enumerate(curves.items()):
        label: str | None = f"all {len(sites)} sites" if len(names) == len(sites) > 1 else together(names)
        label = label if len(curves) <= _MOST_SITES else None
        values = [np.nan if value is None else value for value in curve]
        (line,) = axes.plot(rounds, values, color=COLOURS[index % len(COLOURS)], linewidth=2, label=label)
        line.set(marker=MARKS[index % len(MARKS)], markevery=max(len(rounds) // 8, 1), markersize=5)
    if target is not None:
        axes.axhline(target, color="#9c1c2b", linewidth=1.5, linestyle="--", label=f"limit of the run: {target:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.set_ylabel("epsilon so far")
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right", fontsize=9.5)
    last = {site: history[-1]["epsilon"].get(site) for site in sites}
    words = ", ".join(f"{site} {number(value)}" for site, value in list(last.items())[:_MOST_SITES])
    rows = [(str(entry["round"]), *(number(entry["epsilon"].get(site)) for site in sites)) for entry in history]
    return as_picture(
        figure,
        "Privacy spent, round by round",
        "Each round costs a little; the curve must stay below the dashed line.",
        f"Line chart of epsilon over {len(rounds)} rounds. After the last round: {words}; limit {number(target)}.",
        Grid(("round", *sites), tuple(rows), (False, *[True] * len(sites))),
    )


def participation(taken: Sequence[Sequence[str]], sites: Sequence[str]) -> Picture:
    """Which site's sums were used in which round, as a strip for each site."""
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    there = np.array([[site in names for names in taken] for site in sites])
    figure, axes = new_figure(4.6, min(max(1.3, 0.34 * len(sites) + 0.8), 9.0))
    extent = (0.5, len(taken) + 0.5, len(sites) - 0.5, -0.5)
    axes.imshow(there, aspect="auto", cmap=ListedColormap(["#9c1c2b", "#9cc0dd"]), vmin=0, vmax=1, extent=extent)
    for row, place in zip(*np.nonzero(~there), strict=True):
        if len(taken) <= 60:
            axes.text(place + 1, row, "×", color="white", ha="center", va="center", fontweight="bold")
    if len(taken) <= 60:
        axes.set_xticks(np.arange(1.5, len(taken)), minor=True)
        axes.grid(which="minor", axis="x", color="white", linewidth=1)
    axes.set_yticks(np.arange(0.5, len(sites) - 0.5), minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=3)
    axes.tick_params(which="both", length=0)
    if len(sites) <= 30:
        axes.set_yticks(range(len(sites)), sites)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.spines[["left", "bottom"]].set_visible(False)
    missed = {site: int((~there[row]).sum()) for row, site in enumerate(sites)}
    rows = [(site, str(len(taken) - missed[site]), str(missed[site])) for site in sites]
    words = "No site missed a round." if not any(missed.values()) else f"{sum(map(bool, missed.values()))} missed some."
    return as_picture(
        figure,
        "Who answered in which round",
        "Blue: the site's contribution was used. Dark red with a cross: it was missing, and the round went on without.",
        f"Strip chart of {len(sites)} sites over {len(taken)} rounds. {words}",
        Grid(("site", "rounds used", "rounds missing"), tuple(rows), (False, True, True)),
    )


def score_dots(scores: Mapping[str, Mapping[str, float]], title: str, caption: str, what: str) -> Picture:
    """Scores in percent: a line for each way to train, a dot for each site (or head).

    Args:
        scores: way -> site -> share in [0, 1].
        title: of the figure. caption: how to read it.
        what: what a dot is, such as "site".
    """
    ways, places = list(scores), list(next(iter(scores.values())))
    figure, axes = new_figure(4.6, 0.58 * len(ways) + 1.1)
    for row, way in enumerate(ways):
        values = [100 * scores[way][place] for place in places]
        axes.plot([min(values), max(values)], [row, row], color=_LINE, linewidth=5, solid_capstyle="round", zorder=1)
        for index, value in enumerate(values):
            label = places[index] if row == 0 and len(places) <= _MOST_SITES else None
            mark, colour = MARKS[index % len(MARKS)], COLOURS[index % len(COLOURS)]
            axes.plot(value, row, mark, color=colour, markersize=7, alpha=0.9, label=label, zorder=2)
        axes.text(0.0, row - 0.24, way, transform=axes.get_yaxis_transform(), va="bottom", color=_INK, fontsize=9.5)
    axes.set_yticks([])
    axes.set_ylim(len(ways) - 0.6, -0.75)
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    lowest = 100 * min(min(values.values()) for values in scores.values())
    axes.set_xlim(left=max(min(axes.get_xlim()[0], lowest - 2), -1), right=min(axes.get_xlim()[1], 101))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("balanced accuracy, %")
    axes.spines["left"].set_visible(False)
    if len(places) <= _MOST_SITES:
        figure.legend(loc="outside upper center", ncols=min(4, len(places)), frameon=False, fontsize=9.5)
    means = {way: float(np.mean(list(values.values()))) for way, values in scores.items()}
    words = ", ".join(f"{way} {100 * mean:.1f} %" for way, mean in means.items())
    rows = [(way, *(f"{100 * scores[way][p]:.1f}" for p in places), f"{100 * means[way]:.1f}") for way in ways]
    grid = Grid(("trained on", *places, "mean"), tuple(rows), (False, *[True] * (len(places) + 1)))
    return as_picture(figure, title, caption, f"Dot chart of balanced accuracy by {what}. Means: {words}.", grid)


def plane(
    points: Points,
    labels: NDArray[np.int64],
    names: Sequence[str],
    title: str,
    caption: str,
    limits: Points | None = None,
) -> Picture:
    """Points (n, 2) coloured by label, each label written where its points lie.

    Args:
        points: (n, 2).
        labels: (n,) 0..len(names)-1.
        names: of the labels.
        title: of the figure. caption: how to read it.
        limits: (2, 2) smallest and largest x and y, so that two figures share their axes; default: the points'.
    """
    figure, axes = new_figure(4.6, 4.0)
    middles = scatter_classes(axes, points, labels, names, limits)
    rows = [
        (names[label], f"{(labels == label).sum():,}", *(f"{value:.3g}" for value in middle))
        for label, middle in middles.items()
    ]
    grid = Grid(("group", "dots", "middle, across", "middle, up"), tuple(rows), (False, True, True, True))
    alt = f"Scatter plot of {len(points):,} embeddings in {len(rows)} groups: {', '.join(row[0] for row in rows)}."
    return as_picture(figure, title, caption, alt, grid, dots=True)


def scatter_classes(
    axes: Axes, points: Points, labels: NDArray[np.int64], names: Sequence[str], limits: Points | None = None
) -> dict[int, Points]:
    """Points as `plane` has them, on axes that are there; returns the middle (2,) of each label that is present."""
    order = np.random.default_rng(0).permutation(len(points))  # so that no class covers the others
    colours = np.array([COLOURS[label % len(COLOURS)] for label in labels])
    axes.scatter(points[order, 0], points[order, 1], s=9, c=colours[order], alpha=0.5, linewidths=0)
    middles = {label: np.median(points[labels == label], axis=0) for label in np.unique(labels).tolist()}
    if limits is not None:
        margin = 0.04 * (limits[1] - limits[0]) + 1e-9
        axes.set_xlim(limits[0][0] - margin[0], limits[1][0] + margin[0])
        axes.set_ylim(limits[0][1] - margin[1], limits[1][1] + margin[1])
    written = list(middles.items())[:_MOST_NAMES]
    _write_names(axes, {names[label]: middle for label, middle in written}, [label for label, _ in written])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(_LINE)
    return middles


def _write_names(axes: Axes, middles: Mapping[str, Points], labels: Sequence[int]) -> None:
    """Each name at its middle, moved up or down until no two overlap; a thin line leads back."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    line, letter = 0.058 * (high - low), 0.0185 * (right - left)
    placed: list[tuple[float, float, float]] = []
    colour_of = dict(zip(middles, labels, strict=True))
    for name, (x, y) in sorted(middles.items(), key=lambda item: -item[1][1]):
        half = letter * len(name) / 2 + letter
        x = min(max(x, left + half), right - half)
        steps = sorted((step for step in range(-len(middles) - 2, len(middles) + 3)), key=abs)
        place = next(
            (
                y + step * line / 2
                for step in steps
                if low + line < y + step * line / 2 < high - line
                and all(abs(x - a) > half + width or abs(y + step * line / 2 - b) >= line for a, b, width in placed)
            ),
            y,
        )
        placed.append((x, place, half))
        colour = COLOURS[colour_of[name] % len(COLOURS)]
        box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.0}
        if abs(place - y) > line / 2:
            axes.plot([x, x], [y, place], color=colour, linewidth=0.8, alpha=0.7)
        axes.text(x, place, name, color=colour, fontsize=9, fontweight="bold", ha="center", va="center", bbox=box)


def agreement(values: Mapping[str, tuple[float | None, float | None]], title: str, caption: str) -> Picture:
    """Two marks on a line from -1 to 1 for each of the first names: the synthetic set's, and one to compare with."""
    caption += f" The first {_MOST_NAMES} of {len(values)} are shown." if len(values) > _MOST_NAMES else ""
    values = dict(list(values.items())[:_MOST_NAMES])
    figure, axes = new_figure(4.6, 0.3 * len(values) + 1.2)
    kinds = (("synthetic set", "o", COLOURS[0]), ("own training records", "|", _SOFT))
    for row, pair in enumerate(values.values()):
        axes.plot([-1, 1], [row, row], color=_LINE, linewidth=1, zorder=0)
        for place, (_, mark, colour) in enumerate(kinds):
            value = pair[place]
            if value is not None:
                size, thick = (7, 0) if place == 0 else (13, 3)
                axes.plot(value, row, mark, color=colour, markersize=size, markeredgewidth=thick)
    for label, mark, colour in kinds:
        axes.plot([], [], mark, color=colour, markersize=9, markeredgewidth=2 if mark == "|" else 0, label=label)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.45, -0.55)
    axes.set_xlim(min([-0.05, *[v for pair in values.values() for v in pair if v is not None]]) - 0.03, 1.03)
    axes.set_xlabel("same direction = 1, unrelated = 0")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9.5)
    words = ", ".join(f"{name} {number(pair[0], 'unknown')}" for name, pair in values.items())
    return as_picture(figure, title, caption, f"Dot chart for each class, synthetic set: {words}.", None)


def number(value: float | None, none: str = "no limit") -> str:
    """A number for a table, or a word where there is none."""
    return none if value is None else f"{value:.3g}"


def natural(name: str) -> tuple[object, ...]:
    """A key that sorts site-2 before site-10."""
    import re

    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def together(names: Sequence[str]) -> str:
    """Names in few words."""
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
