"""The comparison in short, for README.md: written between two marks there, from the kept records.

python -m benchmarks.summary
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import as_line, head_of
from benchmarks.rows import ROWS
from benchmarks.table import RESULTS, load_records, write_text
from common.errors import ConfigError, FedHypeVAEError

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- comparison: written by benchmarks/summary.py -->", "<!-- end of the comparison -->"
_WHOLE = (("synthetic-only", "synthetic_only"), ("mixed, λ = 0.5", "mixed"), ("personalised", "personalised"))
_ELSEWHERE = (
    ("α = 0.3: synthetic-only", "organ-dir0.3", "synthetic_only"),
    ("α = 0.3: personalised", "organ-dir0.3", "personalised"),
    ("small sites: personalised", "organ-small", "personalised"),
    ("skin, real sites: personalised", "ham", "personalised"),
    ("skin, a site left out: synthetic-only", "ham-loso", "synthetic_only"),
)


def comparison(records: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables: the even split with every kind of score, and one or two scores of each other data set.

    Args:
        records: of `table.json`.

    Returns:
        Means over seeds as accuracy/balanced accuracy in percent; a dash where a method has no such score.
    """
    even = [["method", "trust", "synthetic-only", "kNN head on the set", *(name for name, _ in _WHOLE[1:])]]
    other = [["method", "trust", *(name for name, _, _ in _ELSEWHERE)]]
    for row in ROWS:
        mine = [one for one in records if (one["method"], one["trust"]) == (row.method, row.trust)]
        iid = [one for one in mine if one["dataset"] == "organ-iid"]
        if iid:
            scores = [_mean([one[key] for one in iid]) for _, key in _WHOLE]
            knn = _mean([one["heads"]["knn"] if one["heads"] else None for one in iid])
            even.append([f"`{row.method}`", row.trust, scores[0], knn, *scores[1:]])
        cells = [_mean([one[key] for one in mine if one["dataset"] == name]) for _, name, key in _ELSEWHERE]
        if any(cell != "-" for cell in cells):
            other.append([f"`{row.method}`", row.trust, *cells])
    tables = [table for table in (even, other) if len(table) > 1]
    return "\n\n".join("\n".join([*head_of(table[0]), *map(as_line, table[1:])]) for table in tables)


def with_comparison(text: str, records: Sequence[dict[str, Any]]) -> str:
    """A README's text with the tables between the marks made anew.

    Raises:
        ConfigError: a mark is missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"expected the marks {BEGIN} and {END}, found not both: put them where the tables belong")
    return f"{head}{BEGIN}\n{comparison(records)}\n{END}{tail}"


def main() -> int:
    """Rewrite README.md; returns the exit code."""
    try:
        write_text(README, with_comparison(README.read_text(encoding="utf-8"), load_records(RESULTS / "table.json")))
    except FedHypeVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _mean(scores: Sequence[dict[str, Any] | None]) -> str:
    known = [one for one in scores if one is not None]
    if not known:
        return "-"
    return "/".join(
        f"{100 * statistics.mean(one[measure] for one in known):.1f}" for measure in ("accuracy", "balanced_accuracy")
    )


if __name__ == "__main__":
    sys.exit(main())
