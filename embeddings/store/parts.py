"""Finished parts of an extraction on disk: what a killed run leaves, and the next one takes up.

A part is one `.npz` in the working folder beside the store: the embeddings of consecutive images and their
keys. It is written whole or not at all, so that a part that exists is right. The folder belongs to one
encoder; another encoder's parts are never mixed in.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.durable import make_private, whole_file, write_atomically
from common.errors import DataError
from common.wire.agreement import same_canary

_PLAN = "plan.json"


class Parts:
    """The working folder of one extraction."""

    def __init__(
        self,
        folder: Path,
        encoder_fingerprint: str,
        former_fingerprint: str = "",
        *,
        canary: str = "",
        precision: str = "float32",
    ) -> None:
        """Open the folder, taking up what an interrupted extraction with the same encoder left.

        Args:
            folder: the working folder; made when missing.
            encoder_fingerprint: of the encoder without the class list; parts of another are discarded.
            former_fingerprint: what an earlier release wrote for the same encoder.
            canary: the encoder's row of the canary, as text; parts of another are discarded, too.
            precision: of the encoder; sets how near two rows of the canary must be.

        Raises:
            DataError: the folder can't be made or written.
        """
        self._folder = folder
        plan = folder / _PLAN
        marks = (encoder_fingerprint, former_fingerprint)
        try:
            if folder.is_dir() and not _fits(plan, marks, canary, precision):
                shutil.rmtree(folder)
            make_private(folder)
            write_atomically(plan, json.dumps({"encoder": encoder_fingerprint, "canary": canary}).encode())
            for left_over in folder.glob("*.partial"):
                left_over.unlink()
        except OSError as error:
            raise DataError(f"{folder}: can't use the working folder ({error.strerror})") from None

    def save(self, embeddings: NDArray[np.float32], keys: NDArray[np.uint8]) -> None:
        """Write one part, on disk when this returns.

        Args:
            embeddings: (k, d) float32.
            keys: (k, 16) uint8.

        Raises:
            DataError: the disk is full or the folder can't be written; earlier parts stay.
        """
        files = self._files()
        number = int(files[-1].stem.removeprefix("part-")) + 1 if files else 0
        target = self._folder / f"part-{number:06d}.npz"
        try:
            with whole_file(target) as file:
                np.savez(file, embeddings=embeddings, keys=keys)
        except OSError as error:
            raise DataError(
                f"{self._folder}: can't write ({error.strerror}); {len(files)} finished parts are kept: make "
                f"room and "
                "run the same command again, which goes on from there"
            ) from None

    def load(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
        """Yield the parts in the order they were written; a damaged one is removed and left out."""
        for path in self._files():
            try:
                with np.load(path, allow_pickle=False) as part:
                    content = part["embeddings"], part["keys"]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
                path.unlink(missing_ok=True)
                continue
            yield content

    def remove(self) -> None:
        """Remove the folder, once the store is written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.npz"))


def _fits(plan: Path, marks: tuple[str, str], canary: str, precision: str) -> bool:
    """Tell whether a folder's parts are of this encoder; where nothing says so, they are not."""
    if not plan.is_file():
        return False
    try:
        found = json.loads(plan.read_text())
        return found["encoder"] in marks and same_canary(found.get("canary", ""), canary, precision)
    except (ValueError, TypeError, KeyError, AttributeError, DataError):
        return False
