"""Replies that broke a rule: said aloud, and kept for the summary, each with the command that shuts its sender out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Refusals:
    """What was refused in a run so far.

    Args:
        say: prints a line.
        before: what an earlier process of the run refused.
    """

    def __init__(self, say: Callable[[str], None], before: Iterable[Mapping[str, Any]] = ()) -> None:
        self._say = say
        self._found = [dict(one) for one in before]

    @property
    def found(self) -> tuple[Mapping[str, Any], ...]:
        """Site, when, what was wrong, and the command; JSON-ready, in the order in which they came."""
        return tuple(self._found)

    def add(self, site: str, when: str, why: str) -> None:
        """Name a site whose reply was refused.

        Args:
            site: its name, or where that is in doubt, its node.
            when: `hello`, `statistics`, `round-3`, and so on.
            why: the rule that was broken; nothing of what was sent.
        """
        command = f"fedhypevae server revoke SERVER-FOLDER {site}"
        self._found.append({"site": site, "when": when, "why": why, "shut_out_with": command})
        self._say(f"{when}: a reply of {site} is not used: {why}; to shut it out: {command}")
