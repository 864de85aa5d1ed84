"""The files below a folder, by the names that a label file may call them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path


def inside(base: Path, path: Path) -> Path | None:
    """Resolve links and `..`; None when the result lies outside the folder."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError):
        return None
    return target if target.is_relative_to(base) else None


def exists(path: Path) -> bool:
    """Whether there is a file or folder; a name longer than the system allows is none, and no error."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden, without following linked folders."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(where) / name


def by_composed_name(base: Path) -> dict[str, list[Path]]:
    """Files and folders by composed name: some systems store an accent as a character of its own, others do not."""
    found: dict[str, list[Path]] = {}
    known = {base}
    for path in walk(base):
        for one in (path, *path.parents):
            if one in known:
                break
            known.add(one)
            found.setdefault(composed(base, one), []).append(one)
    return found


def composed(base: Path, path: Path) -> str:
    """A path below a folder, with Unicode's composed characters (NFC)."""
    return unicodedata.normalize("NFC", path.relative_to(base).as_posix())
