"""Ports for the tests: what the kernel hands out by itself may be handed out twice, once a test has let go of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

# two runs of the tests on one machine begin at different places
_places = itertools.count(os.getpid() * 10)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, of this worker's own range, below those that the kernel hands out: federations
    side by side use theirs up to a minute after they asked for them."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + 500 * (worker % 20) + next(_places) % 500
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
    return found
