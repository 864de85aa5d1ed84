"""`fedhypevae embed`: a site's images to its embedding store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError, DataError
from common.plain import plain
from deploy.console import console

if TYPE_CHECKING:
    from embeddings.encoders.base import EncoderOptions
    from embeddings.extract import Outcome
    from embeddings.pipeline import Listing
    from embeddings.readers.folders import FolderOptions

_SHOWN = 5


def embed(
    images: Annotated[Path, typer.Argument(help="Folder of images or DICOM files; or an .npz of arrays.")],
    out: Annotated[Path, typer.Option(help="The embedding store to write (parquet).")],
    labels: Annotated[Path | None, typer.Option(help="CSV of labels; without it, sub-folders are classes.")] = None,
    encoder: Annotated[
        str,
        typer.Option(help="efficientnet-lite0, dinov2-small|base|large|giant[-registers], hub name, folder."),
    ] = "efficientnet-lite0",
    revision: Annotated[str | None, typer.Option(help="Commit of the hub's model; needed for a hub name.")] = None,
    pooling: Annotated[str, typer.Option(help="cls, mean-patch or both.")] = "cls",
    precision: Annotated[
        str,
        typer.Option(
            help="Arithmetic, the same at all sites: float32; bfloat16 or float16, faster on a GPU (`doctor` says)."
        ),
    ] = "float32",
    store_precision: Annotated[str, typer.Option(help="Stored as float32 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Images at once; by default what fits the device.")] = None,
    compile_network: Annotated[
        bool, typer.Option("--compile", help="Compile the network (pays on large sets).")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the hub; use its local cache.")] = False,
    model_cache: Annotated[Path | None, typer.Option(help="Folder of the hub's cache.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Class list agreed in the federation: a,b,c, or a file with one per line."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="multiclass (one class each), multilabel (several findings) or ordinal (grades)."),
    ] = None,
    findings: Annotated[
        str | None,
        typer.Option(help="Columns of the label file, one a finding: a,b,c. Cells are 1, 0 or empty."),
    ] = None,
    separator: Annotated[str, typer.Option(help="Between findings in one label, as in Effusion|Mass.")] = "|",
    path_column: Annotated[str, typer.Option(help="Column of the path, relative to IMAGES.")] = "path",
    path_suffix: Annotated[str, typer.Option(help="Put after each path, such as .jpg.")] = "",
    label_column: Annotated[str, typer.Option(help="Column of the label.")] = "label",
    patient_column: Annotated[
        str | None, typer.Option(help="Column of the patient; by default `patient`, then the DICOM header.")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="Further column to keep; may be repeated.")] = None,
    no_patients: Annotated[bool, typer.Option("--no-patients", help="Ignore patients.")] = False,
    slices: Annotated[str, typer.Option(help="DICOM series: all slices, or the middle one.")] = "all",
    window: Annotated[str | None, typer.Option(help="CENTER,WIDTH in place of the files' own window.")] = None,
    salt: Annotated[Path | None, typer.Option(help="The site's salt; by default ~/.fedhypevae/patient.salt.")] = None,
) -> None:
    """Turn a folder of images into an embedding store. Nothing leaves this machine.

    Run again, it goes on where it stopped and embeds new images only. Images that can't be used are listed in
    OUT.rejected.csv, and the exit code is 1; it is 2 when nothing could be done.

    Example:

        fedhypevae embed scans/ --labels scans/labels.csv --out site.parquet --encoder dinov2-base
        --revision COMMIT --classes benign,malignant
    """
    import warnings

    from joblib import cpu_count

    from embeddings.encoders.base import EncoderOptions
    from embeddings.readers.classes import given_classes
    from embeddings.readers.findings import label_form
    from embeddings.readers.folders import FolderOptions
    from embeddings.readers.labels import LabelColumns
    from embeddings.readers.patients import default_salt_path, load_salt

    # A damaged file's warning would hide the one line that says what became of it; and it may quote a header.
    warnings.simplefilter("ignore")
    printed = console(stderr=True)
    if not images.exists():  # before a salt is made for nothing
        raise DataError(f"{images}: expected a folder of images, or the .npz of a MedMNIST set, found none")
    form = label_form(task, given_classes(classes), findings, separator)
    columns = LabelColumns(path_column, label_column, patient_column, tuple(column or ()), path_suffix)
    reading = FolderOptions(
        columns=columns,
        form=form,
        slices=_one_of("slices", slices, ("all", "middle")),
        window=_window(window),
        patients=not no_patients,
    )
    options = EncoderOptions(
        revision=revision,
        pooling=_one_of("pooling", pooling, ("cls", "mean-patch", "both")),
        precision=_one_of("precision", precision, ("float32", "bfloat16", "float16")),
        device=_device(device),
        cache_dir=model_cache,
        offline=offline,
        compile=compile_network,
        batch_size=batch_size,
    )
    secret = load_salt(default_salt_path() if salt is None else salt)
    archive = images.suffix.lower() == ".npz"
    listing = _archive(images, out, reading) if archive else _folder(images, labels, reading)
    for remark in listing.remarks:
        printed.print(remark)
    processes = 1 if archive else cpu_count()  # an archive's arrays need no decoding
    outcome = _extract(listing, encoder, options, out, secret, store_precision, processes)
    _report(outcome, out, printed)
    if outcome.shallow:
        printed.print(
            "remark: pictures of 16 bits that use 12 of them at most, and so are nearly black: "
            f"{len(outcome.shallow):,} (such as {min(outcome.shallow)}); store their whole range, or 8 bits",
            soft_wrap=True,
        )
    if outcome.rejected:
        raise typer.Exit(1)


def _folder(images: Path, labels: Path | None, reading: FolderOptions) -> Listing:
    from embeddings.progress import progress
    from embeddings.readers.folders import list_folder

    with progress("Reading labels and headers", None) as advance:
        return list_folder(images, labels, reading, advance)


def _archive(images: Path, out: Path, reading: FolderOptions) -> Listing:
    from embeddings.extract import work_folder
    from embeddings.readers.arrays import is_medmnist, list_medmnist

    if not is_medmnist(images):
        raise DataError(
            f"{images}: expected the arrays of a MedMNIST set (train_images, train_labels, ...); for "
            f"embeddings made "
            "elsewhere use fedhypevae data import"
        )
    folder = work_folder(out)
    return list_medmnist(images, folder.with_name(folder.name + ".images"), reading.form)


def _extract(
    listing: Listing,
    encoder: str,
    options: EncoderOptions,
    out: Path,
    salt: bytes,
    store_precision: str,
    processes: int,
) -> Outcome:
    import shutil

    from embeddings.encoders.load import load_encoder
    from embeddings.extract import extract, work_folder
    from embeddings.progress import progress

    if not listing.items and not listing.rejected:
        raise DataError("expected at least one image, found none")
    network = load_encoder(encoder, options)
    if network.remark:
        console(stderr=True).print(f"remark: {network.remark}", soft_wrap=True)
    with progress(f"Embedding with {network.name} on {network.device}", len(listing.items)) as advance:
        outcome = extract(listing, network, out, salt, precision=store_precision, processes=processes, advance=advance)
    folder = work_folder(out)
    shutil.rmtree(folder.with_name(folder.name + ".images"), ignore_errors=True)
    return outcome


def _report(outcome: Outcome, out: Path, printed: Any) -> None:
    from embeddings.extract import reject_file
    from embeddings.readers.classes import class_lines
    from embeddings.store.file import read_metadata

    rate = outcome.embedded / max(outcome.seconds, 1e-9)
    printed.print(
        f"{out}: {outcome.rows} rows ({outcome.embedded} embedded now at {rate:.0f} images/s, "
        f"{outcome.resumed} from "
        f"an interrupted run, {outcome.reused} from before, {outcome.dropped} dropped), fingerprint "
        f"{outcome.fingerprint[:16]}",
        highlight=False,
        soft_wrap=True,
    )
    metadata = read_metadata(out)
    for line in class_lines(metadata.class_names, metadata.class_counts, metadata.task):
        printed.print(line, soft_wrap=True)
    for source, reason in outcome.rejected[:_SHOWN]:
        line = reason if reason.startswith(source) else f"{source}: {reason}"
        printed.print(f"rejected: {plain(line)}", soft_wrap=True)  # a name may hold a line's end
    if outcome.rejected:
        printed.print(f"{len(outcome.rejected)} rejected; all in {reject_file(out)}", soft_wrap=True)


def _window(text: str | None) -> Any:
    from embeddings.readers.dicom_picture import Window

    if text is None:
        return None
    try:
        center, width = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--window: expected CENTER,WIDTH, found {text!r}") from None
    return Window(center, width)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ConfigError(f"--{option}: expected {', '.join(allowed)}; found {value!r}")
    return value


def _device(name: str) -> str:
    from common.devices import choose_device

    return str(choose_device(name))
