"""Files that survive a kill at any instant: whole or not there, and on the disk before anybody goes on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import FedHypeVAEError

OWNER_FOLDER, OWNER_FILE = 0o700, 0o600
PUBLISHED_FOLDER, PUBLISHED = 0o755, 0o644
NOTHING_SENT = "free the disk; nothing is sent"
NAME_ANOTHER = "name a place that can be written"


def sync_path(path: Path) -> None:
    """Put a file's content, or a directory's names (else a power cut loses a rename), on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(folder: Path) -> None:
    """Make a folder for its owner alone, and so those above it that are missing, whatever the umask.

    Raises:
        OSError: the disk refuses, or a file has that name.
    """
    if folder.is_dir():
        return
    make_private(folder.parent)
    folder.mkdir(mode=OWNER_FOLDER, exist_ok=True)


def keep_private(folder: Path) -> tuple[Path, ...]:
    """Take from others what access they have to a folder and all that is in it, but for public keys (`*.pub`).

    Returns:
        What could not be closed, since somebody else owns it or it is mounted read-only.
    """
    left = []
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() or path.suffix == ".pub":
            continue
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                path.chmod(mode & OWNER_FOLDER)
        except FileNotFoundError:
            continue
        except OSError:
            left.append(path)
    return tuple(left)


def create_private(path: Path) -> BinaryIO:
    """Begin a file for its owner alone, whatever the umask; what was there under its name is removed.

    Raises:
        OSError: the disk refuses.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, OWNER_FILE), "wb")


@contextmanager
def whole_file(path: Path, *, mode: int = OWNER_FILE) -> Iterator[BinaryIO]:
    """A stream whose content takes a file's place, on the disk, once the block is done; else nothing changes.

    Args:
        path: the file; its directory is made if missing, for its owner alone.
        mode: its permissions, whatever the umask: its owner's alone, or `PUBLISHED` for what others are to read.

    Raises:
        OSError: the disk refused; the old content is still there.
    """
    make_private(path.parent)
    partial = path.with_name(partial_name(path))
    try:
        with create_private(partial) as stream:
            yield stream
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder whose files take a place, for all to read, once the block is done; else nothing is there.

    Args:
        path: a folder that does not exist, or is empty.

    Raises:
        OSError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(partial_name(path))
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            file.chmod(PUBLISHED)
        partial.chmod(PUBLISHED_FOLDER)
        if path.is_dir():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_path(path.parent)


def partial_name(path: Path) -> str:
    """The name, beside a file's own, under which this process writes it; a killed process leaves such a file."""
    return f".{path.name}.{os.getpid()}.partial"


def write_atomically(path: Path, content: bytes, *, mode: int = OWNER_FILE) -> None:
    """Replace a file's content as one step; see `whole_file`. Raises OSError if the disk refuses."""
    with whole_file(path, mode=mode) as stream:
        stream.write(content)


def write_output(
    path: Path,
    content: bytes,
    *,
    kind: type[FedHypeVAEError] = FedHypeVAEError,
    cure: str = "free the disk, then resume the run",
) -> None:
    """As `write_atomically`, with an error for a person to act on.

    Args:
        path: the file.
        content: all of it, in bytes.
        kind: of the error.
        cure: what to do if the disk refuses.

    Raises:
        FedHypeVAEError: of that kind: the disk refuses; what was there before is untouched.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise kind(f"can't write {path} ({error.strerror or error}): {cure}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    make_private(folder)
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
    make_private(path.parent)
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
