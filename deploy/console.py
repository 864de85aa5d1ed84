"""What commands print: names and texts from elsewhere have no meaning of their own to a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from common.plain import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table
    from rich.text import Text

    from embeddings.quality.page import Grid


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
    """A sign on standard error that something is being done; `said` changes its words."""
    return console(stderr=True).status(said(text))


@contextmanager
def watching() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each thing that is done."""
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        tasks: dict[str, Any] = {}

        def watch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total if done else None)
            bar.update(tasks[what], completed=done, total=total if done else None)

        yield watch


def table_of(grid: Grid, title: str) -> Table:
    """A page's table for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD)
    for place, name in enumerate(grid.columns):
        words = [word for text in (name, *(row[place] for row in grid.rows)) for word in text.split()]
        # Numbers have the width of their longest word, since narrower they would lose digits; names have what is left.
        width = max(map(len, words), default=0) if grid.right(place) else None
        table.add_column(name, justify="right" if grid.right(place) else "left", width=width, overflow="fold")
    for row in grid.rows:
        table.add_row(*row)
    return table


def said(text: str) -> Text:
    """Text for what rich would read as markup."""
    from rich.text import Text

    return Text(_lines(text))


def _lines(text: object) -> str:
    return "\n".join(plain(line) for line in str(text).split("\n"))
