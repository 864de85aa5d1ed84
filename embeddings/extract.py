"""Embed what a listing names and write the store: resumed where it stopped, new images only, bad ones listed.

Finished parts lie in a working folder beside the store until the store is whole. A row's value depends on its
image and the encoder alone, so that a run that was killed and started again ends with the same bits as one
that was not.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from common.durable import OWNER_FILE, make_private, write_atomically
from common.errors import DataError
from common.plain import plain
from common.wire.agreement import encode, same_canary
from common.wire.identity import EncoderIdentity
from embeddings.canary import embed_canary
from embeddings.encoders.base import Encoder, former_identity, identity_of
from embeddings.pipeline import Batch, Item, Listing, embed_batches
from embeddings.readers.patients import KEY_BYTES, image_key, patient_number
from embeddings.store.file import iterate_store, read_metadata, stored_precision
from embeddings.store.parts import Parts
from embeddings.store.sets import EmbeddingSet, SetMetadata
from embeddings.store.writing import check_path, content_fingerprint, write_chunks

PART_ROWS = 256
ENOUGH = 256  # images for which it pays to start processes that read them


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an extraction did.

    `rows` in the store, of which `embedded` in this run, `resumed` from an interrupted one and `reused` from the
    store before; `dropped` rows whose image is gone; `rejected` (source, reason); `shallow` names nearly black ones.
    """

    rows: int
    embedded: int
    resumed: int
    reused: int
    dropped: int
    rejected: tuple[tuple[str, str], ...]
    seconds: float
    fingerprint: str
    shallow: tuple[str, ...] = ()


def work_folder(out: Path) -> Path:
    """Return the working folder of an extraction into `out`."""
    return out.with_name(f".{out.name}.work")


def reject_file(out: Path) -> Path:
    """Return where the images that could not be used are listed; it names files and stays at the site."""
    return out.with_name(f"{out.name}.rejected.csv")


def extract(
    listing: Listing,
    encoder: Encoder,
    out: Path,
    salt: bytes,
    *,
    precision: str = "float32",
    notes: Mapping[str, str] | None = None,
    processes: int = 1,
    advance: Callable[[int], None] = lambda amount: None,
) -> Outcome:
    """Embed a listing into a store.

    Args:
        listing: the images, labels and classes.
        encoder: the frozen encoder.
        out: the store; an existing one is brought up to date.
        salt: of the site; hashes patients and images.
        precision: of the stored embeddings, `float32` or `float16`.
        notes: kept in the store's metadata.
        processes: that read the images, where there are enough of them; the loads of more than one are pickled.
        advance: called for each image done, those found done included.

    Returns:
        What was done. Images that can't be used are in the reject file beside the store.

    Raises:
        DataError: the existing store has another encoder or precision, no image can be used, another
            extraction writes there, or the disk is full (finished parts are kept).
    """
    start = time.monotonic()
    with _alone(out):
        identity = identity_of(encoder, listing.class_names)
        identity = dataclasses.replace(identity, preprocessing=listing.rendering + identity.preprocessing)
        keys = {image_key(salt, *item.stamp): item for item in listing.items}
        canary = encode(embed_canary(encoder))
        former = former_identity(encoder, identity)
        have = _existing_keys(out, identity, former, canary, precision)
        reused = {key for key in have if key in keys}
        marks = [dataclasses.replace(one, class_names=()).fingerprint() for one in (identity, former)]
        parts = Parts(work_folder(out), *marks, canary=canary, precision=identity.precision)
        resumed = {key.tobytes() for _, chunk in parts.load() for key in chunk} & keys.keys() - reused
        advance(len(reused) + len(resumed))
        pending = [item for key, item in keys.items() if key not in reused and key not in resumed]
        batches = embed_batches(pending, encoder, processes=processes if len(pending) >= ENOUGH else 1)
        embedded, failed, shallow = _save_batches(batches, parts, salt, advance)
        _write_rejects(reject_file(out), rejected := tuple(sorted([*listing.rejected, *failed])))
        rows = len(reused) + len(resumed) + embedded
        if rows == 0:
            raise DataError(
                f"{out}: none of {len(rejected)} images could be used; the reasons are in {reject_file(out)}"
            )
        metadata = SetMetadata(identity, canary=canary, notes=dict(notes or {}), task=listing.task)
        dropped = len(have) - len(reused)
        fingerprint = _assemble(out, parts, keys, reused, salt, metadata, precision, listing.column_names, dropped)
        parts.remove()
    return Outcome(
        rows=rows,
        embedded=embedded,
        resumed=len(resumed),
        reused=len(reused),
        dropped=dropped,
        rejected=rejected,
        seconds=time.monotonic() - start,
        fingerprint=fingerprint,
        shallow=tuple(shallow),
    )


def _existing_keys(
    out: Path, identity: EncoderIdentity, former: EncoderIdentity, canary: str, precision: str
) -> set[bytes]:
    if not out.exists():
        return set()
    metadata = read_metadata(out)
    before = _renewed(metadata, identity, former, canary)
    for field in dataclasses.fields(EncoderIdentity):
        old, new = getattr(before, field.name), getattr(identity, field.name)
        if field.name != "class_names" and old != new:
            raise DataError(
                f"{out}: was made with another encoder ({field.name}: {old}; now: {new}); write to another "
                "file, or remove this one first"
            )
    if not same_canary(metadata.canary, canary, identity.precision):
        raise DataError(
            f"{out}: was made with other settings of the encoder, by its row of the canary (config.json or "
            "preprocessor_config.json has changed); write to another file, or remove this one first"
        )
    if stored_precision(out) != precision:
        raise DataError(f"{out}: holds {stored_precision(out)}, not {precision}; write to another file")
    keys: set[bytes] = set()
    for chunk in iterate_store(out):
        if chunk.keys is None:
            raise DataError(f"{out}: was not made by fedhypevae embed: can't add to it; write to another file")
        keys.update(key.tobytes() for key in chunk.keys)
    return keys


def _renewed(before: SetMetadata, now: EncoderIdentity, former: EncoderIdentity, canary: str) -> EncoderIdentity:
    """The identity of a store, in today's terms where an earlier release wrote another digest for the same encoder.

    Where that digest had random weights in it, on which no row depends, the canary's bits say that it is the same.
    """
    digest, revision = before.identity.weights_digest, before.identity.revision
    same = digest == former.weights_digest if former.weights_digest else before.canary == canary
    if not same:
        return before.identity
    return dataclasses.replace(
        before.identity,
        weights_digest=now.weights_digest,
        revision=now.revision if revision == digest[:16] else revision,  # that of a local folder
    )


def _save_batches(
    batches: Iterable[Batch], parts: Parts, salt: bytes, advance: Callable[[int], None]
) -> tuple[int, list[tuple[str, str]], list[str]]:
    failed, shallow, keys = list[tuple[str, str]](), list[str](), list[bytes]()
    vectors: list[NDArray[np.float32]] = []
    embedded = 0

    def save() -> None:
        if keys:
            packed = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
            parts.save(np.concatenate(vectors), packed)
            vectors.clear()
            keys.clear()

    for batch in batches:
        vectors.append(batch.embeddings)
        keys += [image_key(salt, *item.stamp) for item in batch.items]
        failed += [(item.source, reason) for item, reason in batch.rejected]
        shallow += [item.source for item in batch.shallow]
        embedded += len(batch.items)
        if len(keys) >= PART_ROWS:
            save()
        advance(len(batch.items) + len(batch.rejected))
    save()
    return embedded, failed, shallow


def _assemble(
    out: Path,
    parts: Parts,
    items: Mapping[bytes, Item],
    reused: set[bytes],
    salt: bytes,
    metadata: SetMetadata,
    precision: str,
    column_names: tuple[str, ...],
    dropped: int,
) -> str:
    """Write the rows kept from the old store, then those of the parts; leave an unchanged store as it is."""
    has_patients = any(item.patient is not None for item in items.values())
    findings = metadata.task == "multilabel"
    has_splits = any(item.split is not None for item in items.values())

    def chunk_of(vectors: NDArray[np.float32], keys: NDArray[np.uint8]) -> EmbeddingSet:
        chosen = [items[key.tobytes()] for key in keys]
        patients = [patient_number(salt, item.patient or "") for item in chosen]
        return EmbeddingSet(
            embeddings=vectors,
            labels=np.asarray([item.label for item in chosen], dtype=np.int8 if findings else np.int64),
            metadata=metadata,
            groups=np.asarray(patients, dtype=np.int64) if has_patients else None,
            splits=np.asarray([item.split for item in chosen], dtype=np.str_) if has_splits else None,
            columns={
                name: np.asarray([item.columns[position] for item in chosen], dtype=np.str_)
                for position, name in enumerate(column_names)
            },
            keys=keys,
        )

    def chunks() -> Iterator[EmbeddingSet]:
        seen: set[bytes] = set()
        for vectors, keys in _old_and_new(out, parts, bool(reused)):
            wanted = []
            for position, key in enumerate(keys):
                text = key.tobytes()
                if text in items and text not in seen:
                    seen.add(text)
                    wanted.append(position)
            if wanted:
                yield chunk_of(vectors[wanted], keys[wanted])

    if out.exists() and dropped == 0:
        fingerprint = content_fingerprint(chunks(), metadata, precision)
        if fingerprint == read_metadata(out).fingerprint:
            return fingerprint
    return write_chunks(out, chunks, metadata, precision=precision)


def _old_and_new(out: Path, parts: Parts, old: bool) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
    if old:
        for chunk in iterate_store(out):
            if chunk.keys is not None:
                yield chunk.embeddings, chunk.keys
    yield from parts.load()


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the store for this process, and clear what a killed writer left."""
    check_path(out)
    try:
        make_private(out.parent)
        lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0, mode=OWNER_FILE)
        with lock:
            for left_over in out.parent.glob(f".{out.name}.*.partial"):
                left_over.unlink(missing_ok=True)
            yield
    except Timeout:
        raise DataError(f"{out}: another extraction is writing there; wait for it, or end it") from None
    except OSError as error:
        raise DataError(f"{out}: can't write there ({error.strerror or error})") from None


def _write_rejects(path: Path, rejected: tuple[tuple[str, str], ...]) -> None:
    if not rejected:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "reason"])
    writer.writerows((_cell(name), _cell(reason)) for name, reason in rejected)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula, and no terminal for an order: others name files."""
    shown = plain(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
