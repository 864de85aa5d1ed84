"""The forked child of a warm starter (`starter.py`): takes its message over from the client, runs it and ends."""

from __future__ import annotations

import atexit
import os
import random
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from deploy.site.warm.client import GO, unpack

# Variables that Python and the libraries read once, as they are loaded: with others a message starts cold.
_READ_ONCE = ("PYTHON", "LD_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_", "CUDA_", "FLWR_")
_RECEIVE_S = 10.0
_LONGEST_REQUEST = 10_000_000


def receive(link: socket.socket, loaded_with: Mapping[str, str]) -> None:
    """Become the process that the client would have been, once it says go.

    Args:
        link: to the client.
        loaded_with: the environment in which the libraries were loaded.

    Raises:
        OSError, ValueError: the client is gone, or its request is none that this process can run.
    """
    link.settimeout(_RECEIVE_S)
    head, descriptors, _, _ = socket.recv_fds(link, 8, 4)
    lines = link.makefile("rb", buffering=0)
    while len(head) < 8 and (more := lines.read(8 - len(head))):
        head += more
    length = int.from_bytes(head, "big")
    if len(head) != 8 or len(descriptors) != 4 or length > _LONGEST_REQUEST:
        raise ValueError("expected a request with four descriptors")
    request = b""
    while len(request) < length and (more := lines.read(length - len(request))):
        request += more
    arguments, environment = unpack(request)
    names = sorted(name for name in {*loaded_with, *environment} if name.startswith(_READ_ONCE))
    others = [name for name in names if loaded_with.get(name) != environment.get(name)]
    if len(request) != length or others:
        raise ValueError(f"expected a whole request with the starter's own {', '.join(others) or 'variables'}")
    _seed()
    link.sendall(b"r%d\n" % os.getpid())
    if lines.read(1) != GO:
        os._exit(1)  # its client gave up, and runs the message itself
    lines.close()
    link.close()
    os.fchdir(descriptors[3])
    for number in (0, 1, 2):
        os.dup2(descriptors[number], number)
    for descriptor in descriptors:
        os.close(descriptor)
    for name in loaded_with.keys() - environment.keys():  # what a library set as it was loaded, stays set
        os.environ.pop(name, None)
    os.environ.update(environment)
    sys.argv = [str(Path(__file__).parents[1] / "app_guard.py"), *arguments]


def run_and_end(run: Callable[[], None]) -> NoReturn:
    """Run a program and end as the interpreter would, but leave its objects to the kernel.

    Taking them down would copy all of the memory that is shared with the starter: 0.3 s a message.
    """
    code: object = None
    try:
        run()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finish: Any = threading
    finish._shutdown()  # waits for threads that are no daemons, as multiprocessing does in its own forks
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 0xFF)


def _seed() -> None:
    """Give the global generators, of which a fork gets copies, states of their own. Noise has a source of its own."""
    random.seed()
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed(list(os.urandom(32)))
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)
