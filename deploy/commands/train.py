"""`fedhypevae train`: a classifier from a published bundle, ready to be used with the bundle's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import console, table_of, working


def train(
    bundle: Annotated[Path, typer.Argument(help="The published bundle, or a run's output folder.")],
    out: Annotated[Path, typer.Option(help="The classifier's file.")],
    head: Annotated[str, typer.Option(help="linear, or mlp (one hidden layer).")] = "linear",
    data: Annotated[
        Path | None, typer.Option(help="Own embeddings to learn from as well; the file then stays at the site.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of an mlp's first weights and the order of its rows.")] = 0,
) -> None:
    """Train a classifier on the published set, and save it with the name of the encoder that it needs.

    With own records it is scored on those that the file, or the rule by which a site divides them, keeps for tests.
    Trained on the published set alone it is as private as that set, and may be passed on.

    Example: fedhypevae train bundle --out head.safetensors
    """

    from common.publishing.bundle import load_bundle
    from deploy.classifier.file import save_head, train_head
    from deploy.report.clinical import HOW_TO_READ, calibration_in_words, detail_grid, few_in_words, score_grid
    from deploy.report.own import measured, own_rows
    from embeddings.store.file import read_store

    printed = console()
    with working("Training ..."):
        published = load_bundle(bundle)
        read = None if data is None else own_rows(read_store(data), published)
        trained = train_head(published, head, None if read is None else read.split("train"), seed)
        found = None if read is None or not len(read.rows_of("test")) else measured(trained, read)
        save_head(out, trained)
    encoder = "an encoder that the bundle does not name" if trained.encoder is None else trained.encoder.encoder
    printed.print(f"{out}: {head}, {len(trained.class_names)} classes, for {encoder}", soft_wrap=True)
    if found is not None:
        printed.print(table_of(score_grid({"the set and own records": found}), "on own test records"))
        printed.print(table_of(detail_grid(found), "each class against the rest"))
        for line in filter(None, (HOW_TO_READ, few_in_words(found), calibration_in_words({"here": found}))):
            printed.print(line)
    if read is not None:
        printed.print("It learned from your own records without noise: it stays at the site.")
    for reason in trained.not_private:
        printed.print(f"It is not private: {reason}", style="red")
