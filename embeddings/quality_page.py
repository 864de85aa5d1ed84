"""The data report as lines of text and as one HTML page with its pictures inside."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np

from embeddings.pictures import class_balance, norm_histogram, two_dimensions
from embeddings.quality import Quality
from embeddings.sets import EmbeddingSet


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
        ("classes", f"{present} of {counts.size} present"),
        ("class balance", f"{min(counts):,} ({rarest}) to {max(counts):,} ({commonest})"),
        ("patients", _patients(quality)),
        ("splits", ", ".join(f"{name} {count:,}" for name, count in quality.split_counts.items()) or "none"),
        ("not finite", f"{len(quality.non_finite)} rows"),
        ("constant", f"{len(quality.constant)} rows"),
        ("exact duplicates", _duplicates(quality.exact_count, quality.exact_duplicates)),
        ("near duplicates", _duplicates(quality.near_count, quality.near_duplicates)),
        ("norms", f"min {low:.4g}, 5 % {five:.4g}, median {middle:.4g}, 95 % {ninety_five:.4g}, max {high:.4g}"),
    ]
    if probe is None:
        lines.append(("linear probe", "too few classes or rows to train and test one"))
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
    from jinja2 import Environment

    template = (Path(__file__).parent / "quality.html.j2").read_text(encoding="utf-8")
    identity = [(key, str(value)) for key, value in quality.metadata.identity.to_json().items()]
    identity += [("created", quality.metadata.created), ("fingerprint", quality.metadata.fingerprint)]
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            name=name,
            quality=quality,
            facts=facts(quality),
            identity=identity,
            balance=_inline(class_balance(quality.class_counts, quality.metadata.class_names)),
            norms=_inline(norm_histogram(data.embeddings)),
            plane=_inline(two_dimensions(data, rng)),
        )
    )


def _patients(quality: Quality) -> str:
    if quality.patients is None:
        return "not known: each record counts as one"
    return f"{quality.patients:,}, with at most {quality.most_per_patient} records each"


def _duplicates(count: int, pairs: tuple[tuple[int, int], ...]) -> str:
    if count == 0:
        return "none"
    shown = ", ".join(f"{i} = {j}" for i, j in pairs[:5])
    return f"{count} pairs (rows {shown}{', ...' if count > 5 else ''})"


def _inline(png: bytes) -> str:
    return base64.b64encode(png).decode()
