"""`fedhypevae train`: a classifier from a published bundle, ready to be used with the bundle's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import console, working


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

    Trained on the published set alone it is as private as that set, and may be passed on.

    Example: fedhypevae train bundle --out head.safetensors
    """

    from common.publishing.bundle import load_bundle
    from deploy.classifier.file import save_head, train_head
    from deploy.report.own import own_rows
    from embeddings.store.file import read_store

    printed = console()
    with working("Training ..."):
        published = load_bundle(bundle)
        own = None
        if data is not None:
            read = own_rows(read_store(data), published)
            kept = read.rows_of("train")
            own = read.embeddings[kept], read.labels[kept]
        trained = train_head(published, head, own, seed)
        save_head(out, trained)
    encoder = "an encoder that the bundle does not name" if trained.encoder is None else trained.encoder.encoder
    printed.print(f"{out}: {head}, {len(trained.class_names)} classes, for {encoder}", soft_wrap=True)
    if own is not None:
        printed.print("It learned from your own records without noise: it stays at the site.")
    for reason in trained.not_private:
        printed.print(f"It is not private: {reason}", style="red")
