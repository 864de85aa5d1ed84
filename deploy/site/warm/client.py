"""`flwr-clientapp` at a site with a warm starter: hands the message over, waits, and ends as its process ended.

Run by its path under `python -I -S`, so it starts in some 15 ms: it imports the smallest modules alone, and nothing of
the project's. What is said over the socket:

    here     the length of the request in 8 bytes, with standard input, output, error and the folder as descriptors; the
             arguments and the environment
    there    r and the process id: it stands ready, and has done nothing yet
    here     g: go
    there    x and the exit code

Where no starter listens, or none answers r, the message is run the cold way: until g was sent nothing runs, and from
then on it is never run again.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from contextlib import suppress

SOCKET = "app.sock"
GO = b"g"
_HAND_OVER_S = 20.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def main() -> None:
    """Run one message: `client.py FOLDER ARGUMENTS...`, where FOLDER holds the starter's socket."""
    folder, arguments = sys.argv[1], sys.argv[2:]
    try:
        link, process = _hand_over(folder, arguments)
    except (OSError, ValueError):
        os.execv(sys.executable, [sys.executable, "-P", "-m", "deploy.site.app_guard", *arguments])
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for number in _PASSED_ON:
        signal.signal(number, lambda sent, _: _pass_on(process, sent))
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    try:
        link.settimeout(None)
        link.sendall(GO)
        _wait(link, woken)
        code = _number(_line(link), b"x")
    except (OSError, ValueError):
        sys.exit("flwr-clientapp: the site's starter ended while the app ran; the message is lost, and not run again")
    sys.exit(code)


def pack(arguments: list[str]) -> bytes:
    """The arguments and this process's environment; neither can hold a zero byte."""
    values = [b"%s=%s" % item for item in os.environb.items()]
    return b"\0".join([str(len(arguments)).encode(), *map(os.fsencode, arguments), *values])


def unpack(request: bytes) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a request."""
    count, *parts = map(os.fsdecode, request.split(b"\0"))
    arguments, values = parts[: int(count)], parts[int(count) :]
    return arguments, dict(value.split("=", 1) for value in values)


def _hand_over(folder: str, arguments: list[str]) -> tuple[socket.socket, int]:
    """The connection, and the process that stands ready.

    Raises:
        OSError, ValueError: there is none.
    """
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(_HAND_OVER_S)
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir(folder)  # an address holds 107 bytes, which a folder's whole path may exceed
        link.connect(SOCKET)
    finally:
        os.fchdir(here)
    request = pack(arguments)
    socket.send_fds(link, [len(request).to_bytes(8, "big")], [0, 1, 2, here])
    os.close(here)
    link.sendall(request)
    return link, _number(_line(link), b"r")


def _wait(link: socket.socket, woken: int) -> None:
    """Until the starter has something to say.

    A call that merely blocks may be entered with a signal already taken and not yet passed on, and would sleep over it:
    `woken` is written to as a signal comes.
    """
    news = select.poll()
    for descriptor in (link.fileno(), woken):
        news.register(descriptor, select.POLLIN)
    while link.fileno() not in dict(news.poll()):
        os.read(woken, 4096)


def _line(link: socket.socket) -> bytes:
    line = b""
    while line[-1:] != b"\n" and (more := link.recv(1)):
        line += more
    return line


def _number(line: bytes, kind: bytes) -> int:
    if line[:1] != kind or line[-1:] != b"\n":
        raise ValueError(line)
    return int(line[1:])


def _pass_on(process: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended, and its exit code is on the way
        os.kill(process, number)


if __name__ == "__main__":
    main()
