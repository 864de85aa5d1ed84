"""Files that survive a kill at any instant: whole or not there, and on the disk before anybody goes on."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync_path(path: Path) -> None:
    """Put a file's content, or a directory's names (else a power cut loses a rename), on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace a file's content as one step: temporary file, fsync, rename, fsync of the directory.

    Args:
        path: the file; its directory is made if missing.
        content: all of it, in bytes.
        mode: permissions of a new file, less the process's umask.

    Raises:
        OSError: the disk refused; the old content is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def erase(path: Path) -> None:
    """Overwrite a file's content and remove it; nothing happens if it is not there.

    What the disk itself keeps of old blocks is out of reach: secrets that are erased must also be worth little soon.

    Raises:
        OSError: the disk refused.
    """
    try:
        with path.open("r+b") as stream:
            stream.write(bytes(path.stat().st_size))
            stream.flush()
            os.fsync(stream.fileno())
    except FileNotFoundError:
        return
    path.unlink()
    sync_path(path.parent)


@contextmanager
def hold_room(folder: Path, num_bytes: int) -> Iterator[None]:
    """Keep so many bytes of a folder's disk free for what is written after the block.

    The file that holds them has no name: a process that is killed leaves nothing behind.

    Raises:
        OSError: the disk has less room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".room.{os.getpid()}.partial"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
        os.posix_fallocate(descriptor, 0, num_bytes)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(path: Path, *, timeout_s: float = 20.0) -> Iterator[None]:
    """Hold an exclusive lock that the system drops when the process dies.

    Args:
        path: the lock's file; made if missing, never removed (removing it would let two hold it).
        timeout_s: seconds to wait for another holder.

    Raises:
        TimeoutError: another process still holds it.
        OSError: the file can't be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"{path} is still held by another process after {timeout_s:g} s: wait for it, or end it"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
