"""Files of a ledger: their errors as one kind, and a new one that appears whole, under a name that nobody had."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.durable import sync_path
from common.errors import LedgerError

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


@contextmanager
def as_ledger_errors(path: Path) -> Iterator[None]:
    """Turn every way a file can fail into one LedgerError that says what to do."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:
        raise LedgerError(
            f"privacy ledger {path} can't be used ({error}); nothing is released until it can: free the disk "
            "or the lock, check that the file can be written, or restore it and run `fedhypevae ledger "
            "verify`"
        ) from error


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A temporary name that becomes `destination` at the end; FileExistsError if somebody was first."""
    if destination.exists():
        raise LedgerError(f"{destination} exists already: name a file that does not")
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # the log beside it gets its mode too
        yield partial
        sync_path(partial)
        _give_name(partial, destination)
        sync_path(destination.parent)
    finally:
        partial.unlink(missing_ok=True)


def _give_name(partial: Path, destination: Path) -> None:
    """Rename without replacing: by a hard link, or, where the disk has none (FAT, some shares), by taking the name."""
    try:
        os.link(partial, destination)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        os.close(os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        partial.replace(destination)
