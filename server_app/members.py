"""A site as the server met it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """A site of this run: its node, its name, its stable index."""

    node: int
    name: str
    index: int
