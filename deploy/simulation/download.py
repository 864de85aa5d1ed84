"""The public image sets of the first paper's two settings: fetched from their own publishers, whole or not at all.

Nothing is redistributed here: a licence is shown first and has to be accepted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.durable import write_atomically
from common.errors import DataError, FedHypeVAEError
from common.texts import open_text

_CHUNK = 1 << 20
_TIMEOUT_S = 60.0
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class RemoteFile:
    """One file of a source. `md5` is the publisher's own sum, where there is one."""

    name: str
    url: str
    md5: str | None = None


@dataclass(frozen=True)
class Source:
    """A public image set.

    Attributes:
        name: what the command calls it.
        title: its full name and authors.
        licence: the terms, in a sentence.
        page: where its publisher tells of it.
        files: what is fetched.
        images: what `fedhypevae embed` is to be given, relative to the folder.
        labels: the label file, where one has to be made; relative to the folder.
        settings: the configuration that runs the paper's setting.
    """

    name: str
    title: str
    licence: str
    page: str
    files: tuple[RemoteFile, ...]
    images: str
    labels: str | None
    settings: str


_ISIC = "https://isic-archive.s3.amazonaws.com/challenges/milk10k"
_MILK_IMAGES, _MILK_TRUTH, _MILK_ROWS = (
    f"MILK10k_Training_{part}" for part in ("Input.zip", "GroundTruth.csv", "Metadata.csv")
)
SOURCES = {
    "organsmnist": Source(
        "organsmnist",
        "OrganSMNIST: 25,211 sagittal slices of abdominal CT, 11 organs (MedMNIST v2, Yang et al. 2023)",
        "CC BY 4.0: free to use with attribution. Not intended for clinical use.",
        "https://medmnist.com",
        (
            RemoteFile(
                "organsmnist.npz",
                "https://zenodo.org/record/6496656/files/organsmnist.npz?download=1",
                "e5c39f1af030238290b9557d9503af9d",
            ),
        ),
        "organsmnist.npz",
        None,
        "benchmarks/paper/organsmnist.toml",
    ),
    "milk10k": Source(
        "milk10k",
        "MILK10k: 10,480 images of 5,240 skin lesions, 11 diagnoses (ISIC Archive, doi 10.34970/648456)",
        "CC BY-NC 4.0: attribution, and no commercial use of any kind.",
        "https://challenge.isic-archive.com/landing/milk10k",
        tuple(RemoteFile(name, f"{_ISIC}/{name}") for name in (_MILK_IMAGES, _MILK_TRUTH, _MILK_ROWS)),
        "images",
        "labels.csv",
        "benchmarks/paper/milk10k.toml",
    ),
}


def download(source: Source, folder: Path, started: Callable[[str, int | None], Advance]) -> None:
    """Fetch a source's files, and make its label file where it needs one. What is there already is kept.

    Args:
        source: what to fetch.
        folder: where to; made when missing.
        started: called with a file's name and size in bytes when its transfer begins; what it returns is called
            with every piece.

    Raises:
        FedHypeVAEError: the publisher can't be reached. DataError: a file differs from the publisher's sum, or does
            not have the form that was expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.files:
        if not (folder / file.name).is_file():
            fetch(file, folder, started)
    if source.labels is not None and not (folder / source.labels).is_file():
        images = unpack(folder / _MILK_IMAGES, folder / source.images)
        write_atomically(
            folder / source.labels, milk_labels(folder / _MILK_TRUTH, folder / _MILK_ROWS, images).encode()
        )


def fetch(file: RemoteFile, folder: Path, started: Callable[[str, int | None], Advance]) -> None:
    """Fetch one file; a transfer that broke off goes on where it stopped.

    Raises:
        as `download`. A file with a wrong sum is removed.
    """
    part = folder / f"{file.name}.part"
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            goes_on = answer.status == 206
            length = answer.headers.get("Content-Length")
            whole = None if length is None else int(length) + (have if goes_on else 0)
            advance = started(file.name, whole)
            advance(have if goes_on else 0)
            with part.open("ab" if goes_on else "wb") as sink:
                while piece := answer.read(_CHUNK):
                    sink.write(piece)
                    advance(len(piece))
    except OSError as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 416:
            part.unlink()  # nothing is left to ask for, so what is here is not the publisher's file: begin again
        raise FedHypeVAEError(
            f"could not fetch {file.url} ({error}): check the way out to the internet, and run the command again"
        ) from error
    if whole is not None and part.stat().st_size != whole:
        raise FedHypeVAEError(
            f"{file.name}: expected {whole} bytes, got {part.stat().st_size}: run the command again, it goes on"
        )
    if file.md5 is not None and (found := _md5(part)) != file.md5:
        part.unlink()
        raise DataError(
            f"{file.name}: expected MD5 {file.md5}, found {found}: the file was changed on its way or by its publisher"
        )
    part.replace(folder / file.name)


def unpack(archive: Path, folder: Path) -> list[PurePosixPath]:
    """Unpack the images of a zip file; the folder appears when all of them are there.

    Args:
        archive: the zip file.
        folder: where to; kept if it is there already.

    Returns:
        Paths of the images, relative to the folder, in order.

    Raises:
        DataError: the archive is damaged, or holds a path that leads out of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [one for one in content.infolist() if PurePosixPath(one.filename).suffix in _IMAGE_SUFFIXES]
            paths = [PurePosixPath(one.filename) for one in entries]
            outside = [path for path in paths if path.is_absolute() or ".." in path.parts]
            if outside:
                raise DataError(f"{archive.name}: holds {outside[0]}, which leads out of its folder; nothing unpacked")
            if not folder.is_dir():
                unfinished = folder.with_name(f"{folder.name}.part")
                shutil.rmtree(unfinished, ignore_errors=True)
                content.extractall(unfinished, entries)
                unfinished.replace(folder)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive}: expected a zip file, found a damaged one: remove it and run again") from error
    return sorted(paths)


def milk_labels(truth: Path, rows: Path, images: Iterable[PurePosixPath]) -> str:
    """The label file of MILK10k for `fedhypevae embed`: path, label, and the lesion as the patient.

    Args:
        truth: one row a lesion: `lesion_id` and a column of 0 or 1 for each diagnosis.
        rows: one row an image: `isic_id` and `lesion_id`.
        images: paths of the images; their names are ISIC ids.

    Returns:
        CSV with a header line; images that the tables do not name are left out.

    Raises:
        DataError: a table lacks a column, a lesion has not exactly one diagnosis, or no image is named.
    """
    label_of = {}
    for row in _rows(truth, ("lesion_id",)):
        lesion = row.pop("lesion_id")
        names = [name for name, value in row.items() if float(value) > 0]
        if len(names) != 1:
            raise DataError(f"{truth.name}: expected one diagnosis of lesion {lesion}, found {len(names)}")
        label_of[lesion] = names[0]
    lesion_of = {row["isic_id"]: row["lesion_id"] for row in _rows(rows, ("isic_id", "lesion_id"))}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "label", "patient"))
    found = 0
    for path in images:
        lesion = lesion_of.get(path.stem, "")
        if lesion in label_of:
            writer.writerow((str(path), label_of[lesion], lesion))
            found += 1
    if not found:
        raise DataError(f"{rows.name}: names none of the images; the publisher has changed the form of its files")
    return text.getvalue()


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    with open_text(path, DataError, newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise DataError(f"{path.name}: expected a column {missing[0]!r}, found none")
    return rows


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
