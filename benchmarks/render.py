"""The comparison as Markdown: means over seeds, with their spread over seeds and over sites."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import as_line, head_of
from benchmarks.verdict import architecture_lines, verdict_lines

_SCORES = {
    "synthetic_only": "synthetic-only (λ = 0)",
    "mixed": "mixed (λ = 0.5)",
    "own_lambda": "mixed (own λ)",
    "personalised": "personalised",
}
_FIDELITY = ("mmd2", "precision", "recall", "density", "coverage", "two_sample")


def render(records: Sequence[dict[str, Any]]) -> str:
    """All data sets as Markdown tables.

    Args:
        records: of `table.json`.

    Returns:
        Scores as ACC/BACC in percent, each with its standard deviation over seeds and over sites.
    """
    lines = [
        "Scores are accuracy/balanced accuracy in %, means over sites and seeds; in brackets their standard",
        "deviations, over seeds and then over sites. ε is recomputed from the events of a run, for adding or",
        "removing one record (HAM10000: one lesion). A dash: the method has no such score. Linear, kNN",
        "and MLP heads on a synthetic set are scored on 2,000 test rows of all sites together.",
    ]
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        lines += ["", f"### {dataset}", "", *_scores_table(_of(records, dataset))]
        samples = [record for record in _of(records, dataset) if record["fidelity"] is not None]
        if samples:
            lines += ["", *_samples_table(samples)]
    for section in (verdict_lines(records), architecture_lines(records)):
        if section:
            lines += ["", *section]
    return "\n".join(lines) + "\n"


def score_cell(records: Sequence[dict[str, Any]], name: str) -> str:
    """One cell: mean ACC/BACC over seeds, with the spreads over seeds and over sites."""
    scores = [record[name] for record in records if record[name] is not None]
    if not scores:
        return "-"
    parts = []
    for measure in ("accuracy", "balanced_accuracy"):
        means = [100 * one[measure] for one in scores]
        over_sites = statistics.mean(_spread([100 * value for value in one["per_site"][measure]]) for one in scores)
        parts.append((statistics.mean(means), _spread(means), over_sites))
    (accuracy, seeds, sites), (balanced, balanced_seeds, balanced_sites) = parts
    return (
        f"{accuracy:.1f}/{balanced:.1f} ({seeds:.1f}/{balanced_seeds:.1f} seeds, "
        f"{sites:.1f}/{balanced_sites:.1f} sites)"
    )


def _scores_table(records: Sequence[dict[str, Any]]) -> list[str]:
    head = ["method", "trust", "ε", *_SCORES.values(), "up a site", "down a site", "parameters", "seconds", "seeds"]
    lines = head_of(head)
    for group in _groups(records):
        first = group[0]
        releases_nothing = first["method"] == "local_only"
        epsilon = "-" if releases_nothing else "∞" if first["epsilon"] is None else f"{first['epsilon']:.2f}"
        cells = [first["method"], first["trust"], epsilon, *(score_cell(group, name) for name in _SCORES)]
        cells += [_bytes(first["bytes_up"]), _bytes(first["bytes_down"]), f"{first['released_parameters']:,}"]
        cells += [f"{statistics.mean(one['seconds'] for one in group):.0f}", str(len(group))]
        lines.append(as_line(cells))
    return lines


def _samples_table(records: Sequence[dict[str, Any]]) -> list[str]:
    names = ("linear", "knn", "mlp")
    head = ["synthetic set of", "trust", *(f"{name} head" for name in names), *_FIDELITY]
    lines = head_of(head)
    for group in _groups(records):
        cells = [group[0]["method"], group[0]["trust"]]
        for name in names:
            pair = [
                100 * statistics.mean(one["heads"][name][measure] for one in group)
                for measure in ("accuracy", "balanced_accuracy")
            ]
            cells.append(f"{pair[0]:.1f}/{pair[1]:.1f}")
        for name in _FIDELITY:
            values = [one["fidelity"][name] for one in group if one["fidelity"][name] is not None]
            cells.append(f"{statistics.mean(values):.3f}" if values else "-")
        lines.append(as_line(cells))
    return lines


def _groups(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    keys = dict.fromkeys((record["method"], record["trust"]) for record in records)
    return [[record for record in records if (record["method"], record["trust"]) == key] for key in keys]


def _of(records: Sequence[dict[str, Any]], dataset: str) -> list[dict[str, Any]]:
    return [record for record in records if record["dataset"] == dataset]


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _bytes(count: int) -> str:
    if count == 0:
        return "0"
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
