"""A site's own page, made at the site: what the published set is worth there, and what the site has spent.

It is drawn from the site's records without noise, so it never leaves the site's folder: the page can be written there
and nowhere else, for its owner alone to read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from client_app.ledger.upkeep import Spent
from client_app.place import Place
from common.durable import NAME_ANOTHER, write_output
from common.errors import ConfigError, DataError
from common.evaluation.neighbours import nearest_neighbour_warning
from common.evaluation.scores import Split
from common.publishing.bundle import Bundle
from common.publishing.worth import HEADS, Evaluation, evaluate
from deploy.report import draw
from deploy.report.budget import budget_meters, read_spent, release_grid, run_grid
from deploy.report.clinical import (
    HOW_TO_READ,
    balanced_dots,
    class_grid,
    detail_grid,
    few_in_words,
    reliability_curves,
    score_grid,
    ways_of,
)
from deploy.report.fidelity import (
    ClassFidelity,
    fidelity_by_class,
    fidelity_grid,
    nearest_synthetic,
    telling_rows,
)
from deploy.report.own import OwnRows, as_classes, site_rows
from deploy.report.project import main_components, umap_points
from deploy.report.thumbnails import SIDE, thumbnails
from embeddings.pipeline import Item
from embeddings.quality.page import Grid, Picture, render

PAGE = "report.html"
_DOTS = 1500
_TEMPLATE = Path(__file__).with_name("site.html.j2")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What was measured at the site."""

    fidelity: list[ClassFidelity]
    evaluation: Evaluation
    spent: Spent


def render_site(
    place: Place, bundle: Bundle, items: Mapping[bytes, Item], *, umap: bool, tell: Tell = lambda _: None
) -> str:
    """The page, one self-contained HTML text that describes the site's records.

    Args:
        place: the site.
        bundle: what was published.
        items: the site's images by their salted keys; empty for a page without pictures.
        umap: whether to draw the UMAP view too.
        tell: gets a word before each slow step.

    Raises:
        DataError: the records are not of the bundle's encoder or classes. LedgerError: the ledger can't be trusted.
    """
    tell("reading the records")
    read, published = site_rows(place, bundle), bundle.published()
    labels, names = as_classes(read.labels, bundle.class_names)
    own = replace(read, labels=labels)
    synthetic = published[0], as_classes(published[1], bundle.class_names, read.labels)[0]
    rows: Split = (own.embeddings, own.labels)
    seen, unseen = own.rows_of("train"), own.rows_of("validation", "test")
    train, held_out = own.split("train"), (rows[0][unseen], rows[1][unseen])
    generator = torch.Generator().manual_seed(0)
    tell("comparing class by class")
    fidelity = fidelity_by_class(train, held_out, synthetic, len(names), generator)
    sides, patients = (train[0], held_out[0]), own.groups_of(seen, unseen)
    warning = nearest_neighbour_warning(synthetic[0], *sides, generator, groups=patients) if len(held_out[1]) else None
    tell("training classifiers")
    evaluation = evaluate(
        bundle, read.embeddings, read.labels, groups=own.groups, splits=own.splits, synthetic=published
    )
    linear = evaluation.scores["linear"]
    tell("drawing")
    planes = _planes(own, synthetic, names)
    if umap:
        tell("drawing the UMAP view")
        planes += _umap_planes(own, synthetic, names)
    tell("reading the ledger")
    measured = Measured(fidelity, evaluation, read_spent(place))
    return render(
        _TEMPLATE,
        name=place.name,
        policy=place.policy,
        run=(bundle.statement or {}).get("run", bundle.path.name),
        private=not bundle.not_private,
        tiles_of_site=_tiles(own, names, measured),
        findings=_findings(measured),
        planes=planes,
        agreement=_agreement(names, fidelity),
        fidelity=fidelity_grid(names, fidelity),
        warning=warning,
        neighbours=_neighbours(own, unseen, synthetic, names, items),
        has_images=bool(items),
        scores=balanced_dots(evaluation),
        score_grids={
            HEADS[kind]: score_grid(ways_of(scores), evaluation) for kind, scores in evaluation.scores.items()
        },
        reliability=reliability_curves(ways_of(linear)),
        class_scores=class_grid(ways_of(linear)),
        class_details=detail_grid(linear.mixed),
        how_to_read=HOW_TO_READ,
        few=few_in_words(linear.mixed),
        meter_lines=budget_meters(place, measured.spent),
        runs=run_grid(measured.spent),
        releases=release_grid(place),
    )


def check_page(folder: Path, page: Path) -> Path:
    """The page's path, once it is known to lie in the site's folder (ConfigError)."""
    if not page.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{page} lies outside the site's folder {folder}: this page shows records and stays there")
    return page


def write_site_page(folder: Path, page: Path, text: str) -> None:
    """Write the page, readable by its owner alone.

    Raises:
        ConfigError: the page would lie outside the site's folder. DataError: the disk refuses.
    """
    check_page(folder, page)
    write_output(page, text.encode(), kind=DataError, cure=NAME_ANOTHER)


def _tiles(own: OwnRows, names: tuple[str, ...], measured: Measured) -> list[tuple[str, str, str]]:
    found = measured.evaluation
    patients = "not known" if own.groups is None else f"{len(torch.unique(own.groups)):,}"
    parts = f"{found.train_rows:,} train, {found.validation_rows:,} validation, {found.test_rows:,} test"
    return [
        ("Records", f"{len(own.labels):,}", parts),
        ("Patients", patients, ""),
        ("Classes here", f"{len(torch.unique(own.labels))} of {len(names)}", ""),
        ("Synthetic rows", f"{found.synthetic_rows:,}", "published"),
        ("Epsilon, all runs", f"{measured.spent.epsilon:.2f}", f"at delta {measured.spent.delta:g}"),
    ]


def _findings(measured: Measured) -> list[str]:
    """The page in a few sentences."""
    scores, commonest = measured.evaluation.scores["linear"], measured.evaluation.commonest
    own, mixed, published = (
        100 * getattr(scores, way).balanced_accuracy for way in ("local_only", "mixed", "synthetic_only")
    )
    lines = [
        f"A classifier of your own records names {own:.1f} % of your test images rightly, each class counting the "
        f"same; mixed with what the published set teaches, {mixed:.1f} %; the published set alone, {published:.1f} %. "
        f"To name the commonest class every time would be right for {100 * commonest.balanced_accuracy:.1f} % in the "
        f"same count, and for {100 * commonest.accuracy:.1f} % of all images."
    ]
    middles = [one.middle for one in measured.fidelity if one.middle is not None]
    if middles:
        good = sum(value > 0.5 for value in middles)
        lines.append(f"For {good} of {len(middles)} classes, the synthetic class lies mainly where yours does.")
    separations = [one.told_apart for one in measured.fidelity if one.told_apart is not None]
    if separations and np.mean(separations) > 0.9:
        lines.append(
            "Single synthetic rows are easily told from real ones. That is what a small privacy budget buys: the set "
            "carries the boundaries between classes, not the look of records."
        )
    return lines


def _planes(own: OwnRows, synthetic: Split, names: tuple[str, ...]) -> list[Picture]:
    project = main_components(own.embeddings.numpy())
    caption = "Two main components of your own records: the view in which they differ most."
    sides = [
        (project(rows.numpy()), labels.numpy())
        for rows, labels in (_some(own.embeddings, own.labels), _some(*synthetic))
    ]
    return _pair(sides, names, "main components", caption)


def _umap_planes(own: OwnRows, synthetic: Split, names: tuple[str, ...]) -> list[Picture]:
    real, made = _some(own.embeddings, own.labels), _some(*synthetic)
    points = umap_points(torch.cat([real[0], made[0]]).numpy())
    count = len(real[1])
    sides = [(points[:count], real[1].numpy()), (points[count:], made[1].numpy())]
    caption = "UMAP puts similar embeddings near each other, real and synthetic at once; far distances mean little."
    return _pair(sides, names, "UMAP", caption)


def _pair(sides: list[tuple[Any, Any]], names: tuple[str, ...], view: str, caption: str) -> list[Picture]:
    both = np.concatenate([points for points, _ in sides])
    limits = np.stack([both.min(axis=0), both.max(axis=0)])
    words = ("Your records", "Synthetic")
    return [
        draw.plane(points, labels, names, f"{word}: {view}", caption, limits)
        for word, (points, labels) in zip(words, sides, strict=True)
    ]


def _some(rows: torch.Tensor, labels: torch.Tensor) -> Split:
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:_DOTS]
    return rows[chosen], labels[chosen]


def _agreement(names: tuple[str, ...], found: list[ClassFidelity]) -> Picture:
    values = {name: (one.middle, one.own_middle) for name, one in zip(names, found, strict=True)}
    caption = (
        "Where each class lies, seen from the middle of all classes: near 1 the synthetic class lies in the same "
        "direction as yours. The grey stroke is what your own training records reach."
    )
    return draw.agreement(values, "Do the classes lie where yours do?", caption)


def _neighbours(
    own: OwnRows, unseen: torch.Tensor, synthetic: Split, names: tuple[str, ...], items: Mapping[bytes, Item]
) -> Grid:
    rows = (own.embeddings, own.labels)
    chosen = telling_rows(rows, unseen, synthetic, len(names))
    pictures = thumbnails(own.records, chosen, items)
    lines = []
    for one in nearest_synthetic(torch.tensor(chosen, dtype=torch.int64), rows, synthetic) if chosen else []:
        agree = sum(label == one.label for label in one.near)
        cells: list[Any] = [names[one.label], str(one.row), one.words(names), f"{agree} of {len(one.near)}"]
        cells += [f"{one.distance:.2f}", f"{one.own_distance:.2f}"]
        if items:
            cells.insert(1, _image(pictures.get(one.row), f"image of row {one.row}, {names[one.label]}"))
        lines.append(tuple(cells))
    columns = [
        "your record",
        "row",
        "classes of the nearest synthetic rows",
        "same class",
        "distance",
        "to own nearest",
    ]
    numeric = [False, True, False, True, True, True]
    if items:
        columns.insert(1, "image")
        numeric.insert(1, False)
    return Grid(tuple(columns), tuple(lines), tuple(numeric))


def _image(uri: str | None, alt: str) -> Markup | str:
    if uri is None:
        return "not found"
    return Markup('<img src="{}" alt="{}" width="{}">').format(uri, alt, SIDE)
