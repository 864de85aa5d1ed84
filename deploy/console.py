"""What commands print: names and texts from elsewhere have no meaning of their own to a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from common.plain import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text


def say(text: object, err: bool = False) -> None:
    """Print lines, with escapes for whatever a terminal obeys, hides or reorders."""
    typer.echo(_lines(text), err=err)


def console(*, stderr: bool = False) -> Console:
    """A console for tables and long lines: no markup, and the escapes of `say`, in whatever it prints as text."""
    from rich.console import Console

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(_lines(text), **options)

    return PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


def working(text: str) -> Status:
    """A sign on standard error that something is being done; `said` words it anew."""
    return console(stderr=True).status(said(text))


def said(text: str) -> Text:
    """Text for what rich would read as markup."""
    from rich.text import Text

    return Text(_lines(text))


def _lines(text: object) -> str:
    return "\n".join(plain(line) for line in str(text).split("\n"))
