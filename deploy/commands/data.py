"""`fedhypevae data`: check, compare, partition and import embedding stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.durable import NAME_ANOTHER, write_output
from common.errors import ConfigError, DataError
from common.names import WORDS
from deploy.console import console, say, working

if TYPE_CHECKING:
    from embeddings.simulation.partition import Rows
    from embeddings.store.sets import EmbeddingSet

app = typer.Typer(no_args_is_help=True, help="Check, compare, partition and import embedding stores.")

_Seed = Annotated[int, typer.Option(min=0, help="Seed of all draws.")]


@app.command()
def check(
    store: Annotated[Path, typer.Argument(help="An embedding store.")],
    images: Annotated[Path | None, typer.Option(help="The folder that was embedded, to name files with rows.")] = None,
    salt: Annotated[Path | None, typer.Option(help="The site's salt, if not at its usual place.")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write; by default STORE.html. It stays here.")] = None,
    seed: _Seed = 0,
) -> None:
    """Report what a store holds and what is wrong with it, as text and as an HTML page. Exit code 1 on problems.

    Example:

        fedhypevae data check site.parquet --images scans
    """
    import dataclasses

    import numpy as np
    from rich.table import Table

    from embeddings.quality.quality import inspect, load_unchecked, refusal
    from embeddings.quality.quality_page import facts, render_page

    printed = console()
    with working("Examining ..."):
        data = load_unchecked(store)
        files = {} if images is None else _files(data, images, salt)
        quality = dataclasses.replace(inspect(data, np.random.default_rng(seed), files), refused=refusal(store))
        page = store.with_name(store.name + ".html") if html is None else html
        text = render_page(store.name, data, quality, np.random.default_rng(seed))
        write_output(page, text.encode(), kind=DataError, cure=NAME_ANOTHER)
    table = Table(show_header=False, box=None)
    for key, value in facts(quality):
        table.add_row(key, value)
    printed.print(table)
    for line in quality.problems:
        printed.print(f"problem: {line}", style="red", soft_wrap=True)
    printed.print(f"page: {page}", soft_wrap=True)
    if quality.problems and images is None and data.keys is not None:
        printed.print("to see which files these rows are: --images FOLDER, as it was embedded", soft_wrap=True)
    if quality.problems:
        raise typer.Exit(1)


@app.command()
def compare(
    stores: Annotated[list[Path], typer.Argument(help="Two or more stores; their names name the sites.")],
) -> None:
    """Compare the encoder, classes and canary of stores, as a federation does before a run. Exit code 1 if unlike.

    Example:

        fedhypevae data compare site-a.parquet site-b.parquet
    """
    from common.wire.agreement import check_sites
    from embeddings.quality.finding_facts import against_each_other
    from embeddings.store.file import read_metadata

    sites = {str(store): read_metadata(store) for store in stores}
    found = check_sites(sites)
    for mismatch in found:
        say(mismatch)
    if all(facts.task == "multilabel" for facts in sites.values()):
        for line in against_each_other({store.name: store for store in stores}):
            say(line)
    if found:
        raise typer.Exit(1)
    fingerprint = next(iter(sites.values())).identity.fingerprint()
    say(f"{len(sites)} stores agree: encoder and classes {fingerprint[:16]}, canary within tolerance")


@app.command()
def partition(
    store: Annotated[Path, typer.Argument(help="The store to divide.")],
    out: Annotated[Path, typer.Option(help="Folder for the sites' stores and the picture.")],
    by: Annotated[str, typer.Option(help="iid, dirichlet, patient, or the name of a column.")] = "dirichlet",
    sites: Annotated[int, typer.Option(min=1, help="Number of sites (not for a column).")] = 4,
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration; smaller is more skewed.")] = 0.5,
    seed: _Seed = 0,
) -> None:
    """Divide a store into simulated sites, each with its own splits, and draw who has what.

    No patient comes to two sites. With `dirichlet` a patient is dealt out by the class of most of its records, or by
    its rarest finding.

    Example:

        fedhypevae data partition ham.parquet --by dataset --out sites/
    """
    import dataclasses

    import numpy as np

    from common.evaluation.splits import split_site
    from embeddings.quality.pictures import who_has_what
    from embeddings.store.file import read_store, stored_precision
    from embeddings.store.writing import write_store

    data = read_store(store)
    parts = _parts(data, by, sites, alpha, seed)
    table = []
    for number, (name, rows) in enumerate(parts.items()):
        site = data.take(rows)
        splits = split_site(site.labels, np.random.default_rng([seed, 1, number]), site.groups)
        site = dataclasses.replace(site, splits=splits)
        write_store(out / f"{name}.parquet", site, precision=stored_precision(store))
        table.append(site.metadata.class_counts)
        say(f"{name}: {len(site)} rows, {sum(map(bool, site.metadata.class_counts))} {WORDS[data.metadata.task]}")
    picture = who_has_what(np.asarray(table), list(parts), data.metadata.class_names)
    write_output(out / "partition.png", picture, kind=DataError, cure=NAME_ANOTHER)
    say(f"picture: {out / 'partition.png'}")


@app.command("import")
def import_(
    archive: Annotated[Path, typer.Argument(help=".npz or parquet with embeddings (n, d) and labels.")],
    out: Annotated[Path, typer.Option(help="The embedding store to write (parquet).")],
    encoder: Annotated[str, typer.Option(help="Name of the encoder that made them.")],
    revision: Annotated[str, typer.Option(help="Its revision.")],
    preprocessing: Annotated[str, typer.Option(help="Its preprocessing, in words all sites share.")],
    classes: Annotated[str | None, typer.Option(help="Class list: a,b,c, or a file with one per line.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="multiclass (one class each), multilabel (several findings) or ordinal (grades)."),
    ] = None,
    findings: Annotated[
        str | None, typer.Option(help="Arrays or columns, one a finding: a,b,c. Cells are 1, 0 or empty.")
    ] = None,
    separator: Annotated[str, typer.Option(help="Between findings in one text, as in Effusion|Mass.")] = "|",
    embeddings_array: Annotated[str, typer.Option(help="Name of the embeddings.")] = "embeddings",
    labels_array: Annotated[str, typer.Option(help="Name of the labels.")] = "labels",
    patients_array: Annotated[str | None, typer.Option(help="Name of the patients.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Further array to keep; may be repeated.")] = None,
    store_precision: Annotated[str, typer.Option(help="Stored as float32 or float16.")] = "float32",
    salt: Annotated[Path | None, typer.Option(help="The site's salt.")] = None,
) -> None:
    """Make a store of embeddings that were computed elsewhere. Exit code 1 when rows were rejected.

    Example:

        fedhypevae data import ham_sscd.npz --out ham.parquet --encoder sscd --revision 1 --preprocessing "288
        px" --patients-array lesion_id
    """
    from common.wire.identity import EncoderIdentity
    from embeddings.readers.classes import class_lines, given_classes
    from embeddings.readers.findings import label_form
    from embeddings.readers.patients import default_salt_path, load_salt
    from embeddings.readers.ready import ReadyNames, import_ready
    from embeddings.store.file import read_metadata

    names = ReadyNames(embeddings_array, labels_array, patients=patients_array, columns=tuple(column or ()))
    form = label_form(task, given_classes(classes), findings, separator)
    secret = load_salt(default_salt_path() if salt is None else salt)
    declared = EncoderIdentity(encoder, revision, 0, preprocessing, "declared, not measured", "float32", ())
    rows, rejected = import_ready(archive, out, names, form, declared, secret, store_precision)
    say(f"{out}: {rows} rows")
    metadata = read_metadata(out)
    for line in class_lines(metadata.class_names, metadata.class_counts, metadata.task):
        say(line)
    for source, reason in rejected[:5]:
        say(f"rejected: {source}: {reason}")
    if rejected:
        say(f"{len(rejected)} rejected")
        raise typer.Exit(1)


def _files(data: EmbeddingSet, images: Path, salt: Path | None) -> dict[int, str]:
    """The images of a store's rows by name, those that are found in the folder."""
    from embeddings.readers.keyed import images_by_key

    if data.keys is None:
        raise DataError("the store has no keys of its images (it was imported): leave --images out")
    known = images_by_key(images, salt)
    named = {row: known.get(key.tobytes()) for row, key in enumerate(data.keys)}
    return {row: item.source for row, item in named.items() if item is not None}


def _parts(data: EmbeddingSet, by: str, sites: int, alpha: float, seed: int) -> dict[str, Rows]:
    import numpy as np

    from embeddings.simulation.partition import partition_by_column, partition_by_patient
    from embeddings.simulation.simulated import deal

    if by in data.columns:
        named: dict[str, str] = {}
        found = partition_by_column(data.columns[by])
        for value in found:
            other = named.setdefault(_file_name(value), value)
            if other != value:
                raise DataError(f"column {by}: {other!r} and {value!r} would be one file: rename one of them")
        return {_file_name(value): rows for value, rows in found.items()}
    if by in ("iid", "dirichlet"):
        owners = deal(data, sites, alpha if by == "dirichlet" else None, seed)
        parts = [np.flatnonzero(owners == site) for site in range(sites)]
    elif by == "patient":
        if data.groups is None:
            raise DataError("partition by patient: the store has no patients; use iid, dirichlet or a column")
        parts = partition_by_patient(data.groups, sites, np.random.default_rng([seed, 0]))
    else:
        known = ", ".join(["iid", "dirichlet", "patient", *data.columns])
        raise ConfigError(f"--by: expected {known}; found {by!r}")
    return {f"site-{number:02d}": rows for number, rows in enumerate(parts)}


def _file_name(value: str) -> str:
    """Make a column's value safe as a file name: it comes from a label file."""
    kept = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in value)
    return kept or "empty"
