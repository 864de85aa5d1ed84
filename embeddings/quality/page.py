"""One HTML page with everything inside: the pages of the project share their look and these parts.

A page loads nothing: its pictures are data URIs, it has no script, and its own policy forbids the browser to fetch.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.plain import plain

_BASE = Path(__file__).parent


@dataclass(frozen=True)
class Grid:
    """A table: a heading for each column, and rows of cells; `numeric` says which columns are aligned right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    numeric: tuple[bool, ...] = ()

    def right(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return column < len(self.numeric) and self.numeric[column]


@dataclass(frozen=True)
class Picture:
    """A figure with its words.

    Attributes:
        title: a short heading.
        caption: one line that says how to read it.
        alt: what it shows, for who can't see it.
        uri: the picture as a data URI.
        size: width and height in CSS pixels at most.
        grid: the numbers behind it.
    """

    title: str
    caption: str
    alt: str
    uri: str
    size: tuple[int, int]
    grid: Grid | None = None


def data_uri(content: bytes, kind: Literal["png", "svg+xml", "jpeg"] = "png") -> str:
    """A picture's bytes as a URI that needs no network."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def render(template: Path, **values: Any) -> str:
    """Fill a template that extends `page.html.j2`; whatever it shows is escaped, for HTML and for who reads it.

    Args:
        template: the file.
        values: what it names; a name that is missing is an error of the program.

    Returns:
        The page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader((template.parent, _BASE)),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_seen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)


def _seen(value: Any) -> Any:
    """A text without characters that a reader does not see or that reorder others; line ends stay, markup is ours."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(plain(line) for line in value.split("\n"))
