"""`fedhypevae evaluate`: what a published bundle is worth on a site's own records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.console import console, table_of, working

if TYPE_CHECKING:
    from common.publishing.worth import HeadKind


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The published bundle, or a run's output folder.")],
    data: Annotated[Path, typer.Option(help="The site's embeddings, as `fedhypevae embed` made them.")],
    heads: Annotated[str, typer.Option(help="Which classifiers: some of linear,mlp,knn.")] = "linear,mlp,knn",
    mixing: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Weight of the own classifier; default: by validation.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the scores here too.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the network's start and of the intervals.")] = 0,
) -> None:
    """Train classifiers on own data, on the published set, on both, and mixed; print scores on own test records.

    Own records are divided as the file says, or else as a site divides them for training. The scores depend on the
    records without noise: they stay at the site.

    Example: fedhypevae evaluate bundle --data site.parquet --json scores.json
    """
    import dataclasses
    import json

    from common.durable import NAME_ANOTHER, write_output
    from common.errors import ConfigError, DataError
    from common.publishing.bundle import load_bundle
    from common.publishing.worth import HEADS
    from common.publishing.worth import evaluate as measure
    from deploy.report.clinical import HOW_TO_READ, calibration_in_words, class_grid, few_in_words, score_grid, ways_of
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
    for kind, scores in found.scores.items():
        title = f"{HEADS[kind]}, on {found.test_rows} own test records"
        printed.print(table_of(score_grid(ways_of(scores), found), title))
    first = next(iter(found.scores))
    scores = found.scores[first]
    printed.print(table_of(class_grid(ways_of(scores), intervals=False), f"AUROC of each class, {HEADS[first]}"))
    weights = ", ".join(f"{HEADS[kind]} {scores.mixing:.1f}" for kind, scores in found.scores.items())
    notes = (
        HOW_TO_READ,
        few_in_words(scores.local_only),
        calibration_in_words(ways_of(scores)),
        f"Weight of your own classifier in the mix: {weights}.",
        f"{found.train_rows} own rows to train, {found.validation_rows} to choose the mixing, {found.test_rows} to "
        f"test; {found.synthetic_rows} synthetic rows. These scores depend on your records: keep them here.",
    )
    for line in filter(None, notes):
        printed.print(line, highlight=False)
    for reason in published.not_private:
        printed.print(f"The published set is not private: {reason}", style="red")
    if json_out is not None:
        content = json.dumps(dataclasses.asdict(found), indent=2) + "\n"
        write_output(json_out, content.encode(), kind=DataError, cure=NAME_ANOTHER)
