"""The comparison's table: every method on every data set with every seed, in the plain loop, resumable.

    python -m benchmarks.table
    python -m benchmarks.table --datasets organ-iid --methods dp_fedsgd --seeds 3407 --workers 1

Each finished cell is kept at once in `benchmarks/results/table.json`; a run goes on where the last one stopped. The
table is rendered to `table.md` beside it. `--fresh` starts anew: do so after a change of settings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import run_cell
from benchmarks.pool import run_all
from benchmarks.protocol import SEEDS
from benchmarks.render import render
from benchmarks.rows import ROWS, TABLE_DATASETS, Row
from common.errors import ConfigError, DataError, FedHypeVAEError

RESULTS = Path(__file__).parent / "results"
Task = tuple[str, int, Row]


def load_records(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; none where there was none.

    Raises:
        DataError: the file is there and is no list of records.
    """
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        records = None
    if not isinstance(records, list):
        raise DataError(f"expected a list of records in {path}, found something else: run with --fresh")
    return records


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def key_of(record: dict[str, Any]) -> tuple[str, str, str, int]:
    """What makes a cell: data set, method, trust, seed."""
    return record["dataset"], record["method"], record["trust"], record["seed"]


def open_tasks(
    records: Iterable[dict[str, Any]], datasets: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> list[Task]:
    """The cells that are wanted and not there yet; those of one federation lie side by side.

    Raises:
        ConfigError: a data set or a method that the table does not have.
    """
    known = {row.method for row in ROWS}
    for name in (*(set(datasets) - set(TABLE_DATASETS)), *(set(methods) - known)):
        raise ConfigError(f"unknown {name!r}: data sets are {', '.join(TABLE_DATASETS)}, methods {', '.join(known)}")
    done = {key_of(record) for record in records}
    rows = [row for row in ROWS if not methods or row.method in methods]
    return [
        (dataset, seed, row)
        for dataset in datasets
        for seed in seeds
        for row in rows
        if (dataset, row.method, row.trust, seed) not in done
    ]


def fill(tasks: Sequence[Task], records: list[dict[str, Any]], path: Path, workers: int) -> None:
    """Run the open cells, and keep each as soon as it is there, in the table's own order."""

    def keep(record: dict[str, Any]) -> str:
        records.append(record)
        records.sort(key=_order)
        write_text(path, json.dumps(records, indent=1) + "\n")
        return " ".join(map(str, key_of(record)))

    run_all(run_cell, [(dataset, row, seed) for dataset, seed, row in tasks], workers, keep)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(TABLE_DATASETS))
    parser.add_argument("--methods", nargs="+", default=[], help="all where none is named")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS / "table.json")
    parser.add_argument("--fresh", action="store_true", help="forget the cells that are there")
    options = parser.parse_args(arguments)
    try:
        records = [] if options.fresh else load_records(options.out)
        tasks = open_tasks(records, options.datasets, options.methods, options.seeds)
        fill(tasks, records, options.out, options.workers)
        write_text(options.out.with_suffix(".md"), render(records))
    except FedHypeVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _order(record: dict[str, Any]) -> tuple[int, int, int]:
    names = [(row.method, row.trust) for row in ROWS]
    row, dataset = (record["method"], record["trust"]), record["dataset"]
    return (
        TABLE_DATASETS.index(dataset) if dataset in TABLE_DATASETS else len(TABLE_DATASETS),
        names.index(row) if row in names else len(names),
        record["seed"],
    )


if __name__ == "__main__":
    # one thread a worker: the products are small, and the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
