"""Corrupted and odd files among good ones, fed to the readers: no traceback, no hang, every good record kept.

    python -m tests.fuzz.files --inputs 10000 --seed 1

Each folder has good pictures and DICOM files beside changed ones: bytes flipped, cut, moved or taken from another file,
and DICOM headers with values that no device writes. Label tables and archives of embeddings have good rows among odd
ones. What can't be used must be refused in one line that names it.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import DataError
from common.wire.identity import EncoderIdentity
from embeddings.readers.findings import LabelForm
from embeddings.readers.folders import FolderOptions, list_folder
from embeddings.readers.labels import LabelColumns, read_labels
from embeddings.readers.ready import ReadyNames, import_ready
from tests.embeddings.readers.test_integer_pictures import png, tiff
from tests.fuzz.dicoms import DICOMS, odd_dicom
from tests.fuzz.session import Session, command_line, feed

_IN_ONE_FOLDER = 40
_GOOD = 6
_ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "shift-jis", "utf-16-be")
_CELLS = ("", " ", "\0", '"', "a", "ü", "1", "1.0", "nan", "\ufeff", "=1+1", "x" * 2000, "\u202e", "a\nb", ";", "../a")


def pictures() -> list[bytes]:
    """Good pictures of every kind, as bytes."""
    rng = np.random.default_rng(0)
    pixels = np.cumsum(rng.integers(0, 9, (40, 48, 3)), axis=0).astype(np.uint8)
    made = []
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM"):
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, kind)
        made.append(sink.getvalue())
    grey = rng.integers(0, 65536, (16, 24))
    made += [png(grey, 16), png(grey & 1, 1)]
    made += [tiff(grey >> (16 - bits), bits, white=white) for bits in (1, 4, 8, 12, 16) for white in (False, True)]
    return [*made, tiff(grey, 16, form=2), tiff(grey, 32), tiff(grey / 7.0, 32, form=3)]


def changed(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """A file that is changed in one to three ways."""
    raw = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        size = max(1, len(raw))
        place, length = rng.randrange(size), rng.choice([1, 2, 4, 8, 200])
        way = rng.randrange(7)
        if way == 0:
            raw = raw[:place]
        elif way == 1:
            for _ in range(rng.choice([1, 3, 30])):
                if raw:
                    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif way == 2:  # in the header, where the sizes are
            place = rng.randrange(min(size, 600))
            raw[place : place + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
        elif way == 3:
            raw[place : place + length] = rng.randbytes(length)
        elif way == 4:
            del raw[place : place + length]
        elif way == 5:
            raw[place:place] = raw[: rng.randrange(size)][-length:]
        else:
            raw = raw[:place] + other[rng.randrange(max(1, len(other))) :]
    return bytes(raw)


def run_folder(session: Session, folder: Path, seeds: list[bytes]) -> None:
    """A folder of good and changed files, listed and read."""
    rng, patients = session.rng, session.rng.random() < 0.5
    (folder / "a").mkdir(parents=True)
    good: dict[str, np.ndarray] = {}
    for number in range(_GOOD):
        pixels = session.numbers.integers(0, 256, (20, 20), dtype=np.uint8)
        good[f"a/good{number}"] = pixels
        Image.fromarray(pixels).save(folder / "a" / f"good{number}", "PNG")
    for number in range(_IN_ONE_FOLDER):
        if rng.random() < 0.4:
            content, kind = odd_dicom(rng), "odd header"
        else:
            content, kind = changed(rng, rng.choice(seeds), rng.choice(seeds)), "changed bytes"
        session.counts[kind] += 1
        (folder / "a" / f"bad{number}").write_bytes(content)
    options = FolderOptions(slices=rng.choice(["all", "middle"]), patients=patients)
    try:
        listing = list_folder(folder, None, options)
    except DataError as error:  # patients are known for some alone
        session.check(patients and "the patient is known for" in str(error), f"a folder is lost: {error}")
        listing = list_folder(folder, None, FolderOptions(patients=False))
    named = {source.split("#")[0] for source, _ in listing.rejected} | {item.stamp[0] for item in listing.items}
    # of a series, the middle is kept; a good picture may be nameless where most others have a patient
    session.check(
        options.slices == "middle" or len(named) == _GOOD + _IN_ONE_FOLDER, "a file is neither kept nor named"
    )
    for source, reason in listing.rejected:
        session.check("\n" not in reason, f"{source}: {reason!r}")
        session.check(source not in good or "patient" in reason, f"a good file is refused: {reason}")
        session.refused += 1
    for item in listing.items:
        if len(item.stamp) > 1 and int(item.stamp[1]) > 50:
            continue  # a header may say that there were thousands of frames
        try:
            pixels = item.load()
            session.read += 1
            fine = pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2:] == (3,)) and pixels.size > 0
            session.check(fine, f"{item.source}: {pixels.shape} {pixels.dtype}")
            if item.source in good:
                session.check(np.array_equal(pixels, good[item.source]), f"{item.source} came out as another")
        except DataError as error:
            session.line(str(error), item.source)
            session.check(item.source not in good, f"a good file is lost: {error}")


def run_table(session: Session, folder: Path) -> None:
    """A label table of good and odd rows, in one of many encodings."""
    rng, encoding = session.rng, session.rng.choice(_ENCODINGS)
    rows = [f"g{number}.png,a,p{number}" for number in range(5)]
    odd = [",".join(rng.choice(_CELLS) for _ in range(rng.choice([1, 2, 3, 3, 3, 4]))) for _ in range(5)]
    whole = not any('"' in row or "\n" in row for row in odd)  # a stray quote takes what follows it into its cell
    text = "\r\n".join(["path,label,patient", *rng.sample(rows + odd, 10)])
    content = text.encode(encoding, errors="replace")
    if rng.random() < 0.3:
        content, whole = changed(rng, content, content), False
    session.counts[f"table in {encoding}"] += 1
    (folder / "l.csv").write_bytes(content)
    try:
        table = read_labels(folder / "l.csv", LabelColumns())
    except DataError as error:
        session.line(str(error), "l.csv")
        session.check(not whole or encoding not in ("utf-8", "utf-8-sig"), f"a good table is refused: {error}")
        return
    session.read += 1
    session.check(not set(table.rows) & set(table.rejected), "a row is kept and rejected")
    kept = all(f"g{number}.png" in table.rows for number in range(5))
    session.check(not whole or kept, f"a good row is lost: {content!r:.500}")


def run_archive(session: Session, folder: Path) -> None:
    """An archive of good and odd rows, or one with changed bytes."""
    rng, size = session.rng, 12
    labels: Any = np.asarray([rng.choice(["a", "b", "a ", "", "\u202e", "nan"]) for _ in range(size)])
    who: Any = np.asarray([rng.choice(["p1", " p1", "p2", "", "unknown", "-1"]) for _ in range(size)])
    rows = session.numbers.standard_normal((size, 4)).astype(np.float32)
    rows[rng.randrange(size)] = rng.choice([np.nan, np.inf, 0, 1e30])
    good = np.isfinite(rows).all(axis=1) & rows.any(axis=1) & (np.char.strip(labels) != "")
    good &= ~np.isin(np.char.strip(who), ["", "unknown", "-1"])
    sink = io.BytesIO()
    np.savez(sink, embeddings=rows, labels=np.char.encode(labels, "utf-8") if rng.random() < 0.3 else labels, who=who)
    content, whole = sink.getvalue(), rng.random() < 0.4
    content = content if whole else changed(rng, content, content)
    session.counts["archive, odd rows" if whole else "archive, changed bytes"] += 1
    (folder / "r.npz").write_bytes(content)
    declared = EncoderIdentity("e", "1", 0, "none", "declared", "float32", ())
    out, names = folder / "o.parquet", ReadyNames(patients="who")
    try:
        kept, rejected = import_ready(folder / "r.npz", out, names, LabelForm(), declared, bytes(32), "float32")
        session.read += 1
        session.check(kept + len(rejected) == size or not whole, f"{kept} and {len(rejected)} of {size} rows")
        session.check(kept == good.sum() or not whole, f"{kept} rows are kept, expected {good.sum()}")
    except DataError as error:
        session.line(str(error), "r.npz")
        session.check(not whole or not good.any(), f"a good archive is refused: {error}")


def fuzz_files(inputs: int, seed: int, *, tell: bool = False) -> Session:
    """Feed so many changed inputs to the readers; raises as `feed` does."""
    seeds = [*pictures(), *DICOMS]

    def one(session: Session, folder: Path) -> None:
        run_folder(session, folder / "images", seeds)
        for _ in range(5):
            run_table(session, folder)
            run_archive(session, folder)

    return feed(inputs, seed, one, tell=tell)


if __name__ == "__main__":
    command_line(__doc__ or "", fuzz_files)
