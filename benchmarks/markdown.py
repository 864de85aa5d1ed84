"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def as_line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def head_of(titles: Sequence[str]) -> list[str]:
    """The line of titles, and the rule below it."""
    return [as_line(titles), as_line(["---"] * len(titles))]
