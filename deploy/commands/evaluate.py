"""`fedhypevae evaluate`: what a published bundle is worth on a site's own records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.console import console, working

if TYPE_CHECKING:
    from rich.table import Table

    from common.publishing.worth import Evaluation, HeadKind


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The published bundle, or a run's output folder.")],
    data: Annotated[Path, typer.Option(help="The site's embeddings, as `fedhypevae embed` made them.")],
    heads: Annotated[str, typer.Option(help="Which classifiers: some of linear,mlp,knn.")] = "linear,mlp,knn",
    mixing: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Weight of the own classifier; default: by validation.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the scores here too.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of a drawn split and of the network's start.")] = 0,
) -> None:
    """Train classifiers on own data, on the published set, on both, and mixed; print scores on own test records.

    The scores depend on the records without noise: they stay at the site.

    Example: fedhypevae evaluate bundle --data site.parquet --json scores.json
    """
    import dataclasses
    import json

    from common.durable import NAME_ANOTHER, write_output
    from common.errors import ConfigError, DataError
    from common.publishing.bundle import load_bundle
    from common.publishing.worth import HEADS
    from common.publishing.worth import evaluate as measure
    from deploy.report.own import own_rows
    from embeddings.store.file import read_store

    asked = [name.strip() for name in heads.split(",") if name.strip()]
    kinds: list[HeadKind] = [kind for kind in HEADS if kind in asked]
    if len(kinds) != len(set(asked)) or not kinds:
        raise ConfigError(f"--heads must be some of {','.join(HEADS)}, found {heads!r}")
    printed = console()
    with working("Training classifiers ..."):
        published = load_bundle(bundle)
        own = own_rows(read_store(data), published)
        found = measure(
            published,
            own.embeddings,
            own.labels,
            groups=own.groups,
            splits=own.splits,
            mixing=mixing,
            heads=kinds,
            seed=seed,
        )
    printed.print(_table(found))
    printed.print(
        f"{found.train_rows} own rows to train, {found.validation_rows} to choose the mixing, {found.test_rows} to "
        f"test; {found.synthetic_rows} synthetic rows. These scores depend on your records: keep them here.",
        highlight=False,
    )
    for reason in published.not_private:
        printed.print(f"The published set is not private: {reason}", style="red")
    if json_out is not None:
        content = json.dumps(dataclasses.asdict(found), indent=2) + "\n"
        write_output(json_out, content.encode(), kind=DataError, cure=NAME_ANOTHER)


def _table(found: Evaluation) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from common.publishing.worth import HEADS, WAYS

    table = Table(title="accuracy/balanced accuracy in %, on the site's own test records", box=SIMPLE_HEAD)
    table.add_column("trained on", no_wrap=True)
    for kind in found.scores:
        table.add_column(HEADS[kind], justify="right")
    for way, label in WAYS.items():
        parts = [getattr(scores, way) for scores in found.scores.values()]
        table.add_row(label, *(f"{100 * part.accuracy:.1f}/{100 * part.balanced_accuracy:.1f}" for part in parts))
    table.add_row("weight of own in the mix", *(f"{scores.mixing:.1f}" for scores in found.scores.values()))
    return table
