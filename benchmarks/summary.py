"""The tables of README.md and of the documentation that are computed: each is written between two marks of its page.

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
from common.privacy.calibration import calibrate_noise_multiplier
from common.privacy.composition import epsilon_from_rdp, epsilon_pld, rdp_curve
from common.privacy.events import PrivacyEvent, gaussian
from common.privacy.filter import filter_allows

ROOT = Path(__file__).parent.parent
_WHOLE = (("synthetic-only", "synthetic_only"), ("mixed, λ = 0.5", "mixed"), ("personalised", "personalised"))
_ELSEWHERE = (
    ("α = 0.3: synthetic-only", "organ-dir0.3", "synthetic_only"),
    ("α = 0.3: personalised", "organ-dir0.3", "personalised"),
    ("small sites: personalised", "organ-small", "personalised"),
    ("skin, real sites: personalised", "ham", "personalised"),
    ("skin, a site left out: synthetic-only", "ham-loso", "synthetic_only"),
)

_HEADLINE = (
    ("a hospital by itself", "local_only", "none"),
    ("a private CVAE, as published before", "dp_cvae", "local"),
    ("FedHypeVAE, each hospital's own noise", "fedhypevae", "local"),
    ("FedHypeVAE without a latent, shared noise", "fedhypevae_tied", "secagg"),
    ("all data in one place, no privacy", "centralised", "none"),
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


def headline(records: Sequence[dict[str, Any]]) -> str:
    """One Markdown table of five rows, for a reader who asks what it is good for; scores as `comparison`."""
    rows = [["ten hospitals", "published set alone, even hospitals", "with it, even", "with it, uneven (α = 0.3)"]]
    for name, method, trust in _HEADLINE:
        mine = [one for one in records if (one["method"], one["trust"]) == (method, trust)]
        iid, uneven = ([one for one in mine if one["dataset"] == data] for data in ("organ-iid", "organ-dir0.3"))
        scores = ((iid, "synthetic_only"), (iid, "personalised"), (uneven, "personalised"))
        rows.append([name, *(_mean([one[key] for one in some]) for some, key in scores)])
    return "\n".join([*head_of(rows[0]), *map(as_line, rows[1:])])


def ledger_example(_: Sequence[dict[str, Any]] = ()) -> str:
    """A ledger as `ledger show` adds it up: runs of ε = 1 until the lifetime's budget refuses one."""
    delta, lifetime, rounds = 1e-5, 3.0, 100
    run = [gaussian(calibrate_noise_multiplier(1.0, delta, 1.0, rounds), count=rounds)]
    rows, spent = [["run", "ε of the run alone", "ε of all runs", "the ledger"]], list[PrivacyEvent]()
    while len(rows) < 2 or rows[-1][-1] == "charged":
        allowed = filter_allows(spent, run, lifetime, delta)
        spent = [*spent, *run]
        total = epsilon_pld(spent, delta) if spent == run else epsilon_from_rdp(rdp_curve(spent), delta)
        rows.append(
            [str(len(rows)), f"{epsilon_pld(run, delta):.2f}", f"{total:.2f}", "charged" if allowed else "refused"]
        )
    return "\n".join([*head_of(rows[0]), *map(as_line, rows[1:])])


SECTIONS = (
    (ROOT / "README.md", "headline", headline),
    (ROOT / "docs" / "measurements.md", "comparison", comparison),
    (ROOT / "docs" / "promise.md", "ledger", ledger_example),
)


def with_section(text: str, name: str, table: str) -> str:
    """A page's text with `table` between the marks of the section.

    Raises:
        ConfigError: a mark is missing.
    """
    begin, end = f"<!-- {name}: written by benchmarks/summary.py -->", f"<!-- end of the {name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ConfigError(f"expected the marks {begin} and {end}, found not both: put them where the table belongs")
    return f"{head}{begin}\n\n{table}\n\n{end}{tail}"


def main() -> int:
    """Write every section again; returns the exit code."""
    try:
        records = load_records(RESULTS / "table.json")
        for page, name, table in SECTIONS:
            write_text(page, with_section(page.read_text(encoding="utf-8"), name, table(records)))
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
