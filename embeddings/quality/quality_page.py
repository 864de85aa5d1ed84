"""The data report as lines of text and as one HTML page with its pictures inside."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from common.names import WORD, WORDS
from embeddings.quality.page import Grid, Picture, data_uri, render
from embeddings.quality.pictures import class_balance, co_occurrence, norm_histogram, two_dimensions
from embeddings.quality.probe import FindingProbe
from embeddings.quality.quality import Pairs, Quality
from embeddings.store.sets import EmbeddingSet


def facts(quality: Quality) -> list[tuple[str, str]]:
    """Return the report as (name, value) lines, in the order to be read."""
    counts = np.asarray(quality.class_counts or (0,))
    present = int((counts > 0).sum())
    names = quality.metadata.class_names or ("-",)
    rarest, commonest = names[int(counts.argmin())], names[int(counts.argmax())]
    low, five, middle, ninety_five, high = quality.norm_quantiles
    probe = quality.probe
    lines = [
        ("rows", f"{quality.rows:,} of width {quality.metadata.identity.dimension}"),
        (WORDS[quality.metadata.task], f"{present} of {counts.size} present"),
        ("balance", f"{min(counts):,} ({rarest}) to {max(counts):,} ({commonest})"),
        ("patients", _patients(quality)),
        ("splits", ", ".join(f"{name} {count:,}" for name, count in quality.split_counts.items()) or "none"),
        ("not finite", f"{len(quality.non_finite)} rows"),
        ("constant", f"{len(quality.constant)} rows"),
        ("exact duplicates", _duplicates(quality, quality.exact)),
        ("near duplicates", _duplicates(quality, quality.near)),
        ("norms", f"min {low:.4g}, 5 % {five:.4g}, median {middle:.4g}, 95 % {ninety_five:.4g}, max {high:.4g}"),
    ]
    if quality.findings is not None:
        lines[3:3] = quality.findings.lines()
    if probe is None:
        lines.append(("linear probe", "none: too few classes or rows to train and test one, or too large numbers"))
    elif isinstance(probe, FindingProbe):
        lines.append(
            (
                "linear probe",
                f"AUROC {probe.auroc:.3f}, mean over {probe.findings} findings (chance 0.500; {probe.train_rows:,} "
                f"train, {probe.test_rows:,} test rows)",
            )
        )
    else:
        lines.append(
            (
                "linear probe",
                f"balanced accuracy {probe.balanced_accuracy:.3f}, accuracy {probe.accuracy:.3f} (chance "
                f"{probe.chance:.3f}; {probe.train_rows:,} train, {probe.test_rows:,} test rows)",
            )
        )
    return lines


def render_page(name: str, data: EmbeddingSet, quality: Quality, rng: np.random.Generator) -> str:
    """Render the report as one HTML page that loads nothing from elsewhere.

    Args:
        name: of the store, for the title.
        data: the set.
        quality: its report.
        rng: chooses the records drawn in two dimensions.

    Returns:
        The page.
    """
    identity = [
        (key, ", ".join(value) if isinstance(value, list) else str(value))
        for key, value in quality.metadata.identity.to_json().items()
    ]
    identity += [("created", quality.metadata.created), ("fingerprint", quality.metadata.fingerprint)]
    names = quality.metadata.class_names
    what = WORD[quality.metadata.task]
    counts = Grid((what, "records"), tuple(zip(names, quality.class_counts, strict=True)), (False, True))
    few = f"Few records of a {what} make it hard to learn."
    near = "Each dot is a record; near dots have similar images."
    if quality.findings is not None:
        counts = Grid(*quality.findings.table(), (False, True, True, True, True))
        near += " Its colour is that of its rarest finding."
    pictures = (
        _picture(f"Records per {what}", few, class_balance(quality.class_counts, names), counts),
        *_together(quality),
        _picture("Norms", "Lengths of the embeddings: one hump from one encoder.", norm_histogram(data.embeddings)),
        _picture("Two main components", near, two_dimensions(data, rng)),
    )
    return render(
        Path(__file__).with_name("quality.html.j2"),
        name=name,
        quality=quality,
        facts=Grid(("what", "found"), tuple(facts(quality))),
        identity=Grid(("field", "value"), tuple(identity)),
        pictures=pictures,
    )


def _together(quality: Quality) -> tuple[Picture, ...]:
    if quality.findings is None:
        return ()
    chosen, counts = quality.findings.pairs()
    names = [quality.metadata.class_names[finding] for finding in chosen]
    rows = tuple((name, *map(int, row)) for name, row in zip(names, counts, strict=True))
    legend = "Records that have both findings, as a share of those that have the one on the left."
    grid = Grid(("finding", *names), rows, (False, *[True] * len(names)))
    return (_picture("Found together", legend, co_occurrence(counts, names), grid),)


def _picture(title: str, caption: str, png: bytes, grid: Grid | None = None) -> Picture:
    with Image.open(io.BytesIO(png)) as image:
        size = image.size
    return Picture(title, caption, f"{title}: {caption}", data_uri(png), size, grid)


def _patients(quality: Quality) -> str:
    if quality.patients is None:
        return "not known: each record counts as one"
    return f"{quality.patients:,}, with at most {quality.most_per_patient} records each"


def _duplicates(quality: Quality, pairs: Pairs) -> str:
    return f"{pairs.count} pairs (rows {quality.shown(pairs)})" if pairs.count else "none"
