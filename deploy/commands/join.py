"""`fedhypevae join`: a new site takes a finished run into use for its own records, without another round."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.console import console, working


def join(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A published bundle, or a run's output folder.")],
    data: Annotated[Path, typer.Option(help="The new site's embeddings, as `fedhypevae embed` made them.")],
    out: Annotated[Path, typer.Option(help="The new file: a set (parquet), or a classifier (safetensors).")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of the personalised set.")] = 10_000,
    model: Annotated[str, typer.Option(help="After mh_pfedhn: the site's model, linear or mlp-WIDTH.")] = "linear",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same rows.")] = 0,
) -> None:
    """Fit a finished run to a site that was not in it: a personalised synthetic set, or a personal classifier.

    After a run of fedhypevae the site fits its own code, with the generator frozen, and draws from it. After a run of
    mh_pfedhn it fits the embeddings of its own model, with the hypernetwork frozen. Both read the site's records
    without noise, and cost no privacy as long as the new file stays at the site.

    Example: fedhypevae join bundle --data site.parquet --out personal.parquet
    """

    from common.errors import ConfigError
    from common.methods import get_method
    from common.publishing.bundle import load_bundle
    from deploy.classifier.file import save_head
    from deploy.classifier.joining import STAYS, personal_model, personal_set
    from deploy.report.clinical import interval
    from deploy.report.own import measured, own_rows
    from embeddings.store.file import read_store

    if out.exists():
        raise ConfigError(f"{out} exists already: name a file that does not with --out")
    printed = console()
    bundle = load_bundle(run)
    own = own_rows(read_store(data), bundle)
    train = own.split("train")
    with working("Fitting ..."):
        if get_method(bundle.config.method).personal_scores is not None:
            trained = personal_model(bundle, train, model)
            save_head(out, trained)
            content = f"{model}, {len(bundle.class_names)} classes"
            if len(own.rows_of("test")):
                found = measured(trained, own)
                content += f"; {100 * found.accuracy:.1f}/{100 * found.balanced_accuracy:.1f} % on own test records"
                content += f", AUROC {interval(found.auroc)}"
        else:
            written = personal_set(bundle, train, rows, seed, out)
            content = f"{written.rows} rows of width {bundle.dim}; sha256 {written.sha256}"
    printed.print(f"{out}: {content}", soft_wrap=True)
    printed.print(f"NOT PRIVATE: {STAYS}", style="red")
