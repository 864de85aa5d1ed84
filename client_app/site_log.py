"""The site's own log: what went wrong, in full, for its own people. Nothing of it travels."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from common.durable import OWNER_FILE

LOG_FILE = "site.log"


def write_log(folder: Path | None, text: str) -> None:
    """Add an entry with the time, and print it; a site without a folder has its console alone.

    A disk that is full must not turn the log's own failure into an answer: such an entry is lost.
    """
    entry = f"{datetime.now(UTC).isoformat()} {text}\n"
    with suppress(OSError, ValueError):
        print(entry, flush=True)
    if folder is not None:
        with suppress(OSError, ValueError):
            descriptor = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, OWNER_FILE)
            with os.fdopen(descriptor, "a", encoding="utf-8") as log:
                log.write(entry)
