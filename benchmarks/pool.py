"""Tasks shared out to processes, each result kept as soon as it is there."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def run_all(
    function: Callable[..., dict[str, Any]],
    tasks: Sequence[tuple[Any, ...]],
    workers: int,
    keep: Callable[[dict[str, Any]], str],
) -> None:
    """Call `function(*task)` for every task in processes of their own.

    Args:
        function: importable by name, since every worker starts afresh.
        tasks: its arguments; neighbours in the list tend to run in one worker.
        workers: number of processes; below 1 counts as 1.
        keep: called here with each result as it comes; returns a few words for the progress line.

    Raises:
        Exception: what a task raised; results that came before it were kept.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, ProcessPoolExecutor(max(1, workers), mp_context=context) as pool:
        bar = progress.add_task("cells", total=len(tasks))
        for finished in as_completed([pool.submit(function, *task) for task in tasks]):
            progress.update(bar, advance=1, description="cell " + keep(finished.result()))
