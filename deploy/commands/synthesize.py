"""`fedhypevae synthesize`: as many synthetic rows as one likes, from the published generator alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deploy.console import say

if TYPE_CHECKING:
    from common.evaluation.scores import Split
    from common.publishing.bundle import Bundle
    from common.publishing.parquet import Written


def synthesize(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's output folder, a bundle, or a generator.safetensors.")
    ],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")],
    balance: Annotated[
        Literal["uniform", "dp-counts", "given"],
        typer.Option(help="Rows of each class: evenly, by the run's noised counts, or as given by --share."),
    ] = "uniform",
    share: Annotated[
        list[str] | None, typer.Option("--share", help="With --balance given: CLASS=WEIGHT; may be repeated.")
    ] = None,
    code: Annotated[
        str | None, typer.Option(help="meta, mixture, or the number of one code of it; default: as published.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The new file; default: synthetic-ROWS-SEED.parquet.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="At most so many; default: one a core, up to 4. The rows are the same.")
    ] = None,
    as_drawn: Annotated[
        bool,
        typer.Option(
            "--as-drawn",
            help="Take rows as they come: the generator names some otherwise than asked, so classes are uneven then.",
        ),
    ] = False,
) -> None:
    """Draw synthetic embeddings from a published generator, on any machine, without limit.

    Drawing more is free of privacy cost. The generator was released under differential privacy; a sample is a function
    of it and of fresh randomness alone; and no function of a released value tells more of the records than the value
    does (post-processing).

    Example: fedhypevae synthesize outputs/demo --rows 1000000 --seed 1 --out more.parquet
    """
    import time

    from common.errors import ConfigError
    from common.publishing.bundle import FREE_OF_COST, load_bundle
    from common.publishing.parquet import write_rows

    bundle = load_bundle(run)
    weights = None if share is None else parse_shares(share, bundle.class_names)
    blocks = bundle.sample(
        rows, balance=balance, shares=weights, code=code, seed=seed, threads=threads, as_drawn=as_drawn
    )
    out = Path(f"synthetic-{rows}-{seed}.parquet") if out is None else out
    if out.exists():
        raise ConfigError(f"{out} exists already: name a file that does not with --out")
    chosen = {"rows": rows, "balance": balance, "shares": weights, "code": code, "seed": seed, "as_drawn": as_drawn}
    notes = bundle.notes(bundle.not_private, chosen)
    started = time.monotonic()
    shown = _with_progress(blocks, rows)
    names, kind = bundle.class_names, bundle.context.problem.task
    written = write_rows(out, shown, dim=bundle.dim, class_names=names, notes=notes, task=kind)
    _report(bundle, written, out, time.monotonic() - started)
    say(FREE_OF_COST)


def parse_shares(texts: Sequence[str], class_names: Sequence[str]) -> list[float]:
    """Weights of the classes from `CLASS=WEIGHT`; a class that is not named gets none.

    Raises:
        ConfigError: another form, an unknown class, or a class named twice.
    """
    from common.errors import ConfigError

    found: dict[str, float] = {}
    for text in texts:
        name, _, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            name, value = "", 0.0
        if name not in class_names or name in found:
            raise ConfigError(f"a share is CLASS=WEIGHT, once for each of {', '.join(class_names)}; found {text!r}")
        found[name] = value
    return [found.get(name, 0.0) for name in class_names]


def _with_progress(blocks: Iterable[Split], rows: int) -> Iterator[Split]:
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(f"drawing {rows} rows", total=rows)
        for block in blocks:
            yield block
            bar.update(task, advance=len(block[1]))


def _report(bundle: Bundle, written: Written, out: Path, seconds: float) -> None:
    for name, count in zip(bundle.class_names, written.class_counts, strict=True):
        say(f"{count:>10} {name}")
    say(
        f"{written.rows} rows of width {bundle.dim} in {out} ({written.size / 1e6:.1f} MB, {seconds:.1f} s); "
        f"sha256 {written.sha256}"
    )
    if bundle.not_private:
        say(f"NOT PRIVATE: {'; '.join(bundle.not_private)}")
