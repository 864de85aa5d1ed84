"""Pictures read and prepared: in the caller's thread, or in processes, where a decoder that crashes costs one file.

Decoders share one interpreter's lock when they are threads, and one crash ends them all. Here each is a fork of a
process that has imported what they need, which starts them in milliseconds. No part of the caller's program is run
again, as it would be by `multiprocessing`, and a pool of `concurrent.futures` is lost with its first process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from embeddings.limits import one_large_in_all
from embeddings.readers.images import Shallow

Load = Callable[[], NDArray[np.uint8]]
Prepare = Callable[[NDArray[np.uint8]], NDArray[Any]]
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from embeddings.decoding import serve; serve()"
# One thread each, and none that a library starts when it is loaded: such a process can't be forked. No word of
# `transformers` that torch is not there.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# What forks would each import for a DICOM file; tens of milliseconds, or hundreds where cores are shared.
_OF_DICOM = ("pydicom.pixels", "pydicom.pixels.decoders", "pylibjpeg", "libjpeg", "openjpeg")
_AHEAD = 1 << 20  # bytes of rows that a decoder may be ahead of its reader, or as many as the system grants
_SECONDS = 300  # of processor time for one picture, ten times what the largest takes; a hang ends as a crash does
_CRASHED = "reading it ended the process that did (a decoder's crash or hang, or no memory left); leave it out"


class Answer(NamedTuple):
    """The `row` of a picture, or the `reason` why there is none; `shallow`: of 16 bits, with 12 in use."""

    row: NDArray[Any] | None
    reason: str = ""
    shallow: bool = False


class Decoders:
    """Reads and prepares pictures in `processes` processes, or in the caller's thread where that is 1.

    Args:
        prepare: turns an image into the network's input; can be pickled where there are processes, as every load can.
        processes: how many, at least 1.
    """

    def __init__(self, prepare: Prepare, processes: int) -> None:
        self._prepare = prepare
        self._processes = processes
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def __enter__(self) -> Decoders:
        if self._processes > 1:
            self._control, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-c", _PROGRAM, *sys.path]
                self._parent = subprocess.Popen(command, stdin=theirs.fileno(), env={**os.environ, **_ENVIRONMENT})
            try:
                with Connection(os.dup(self._control.fileno())) as start, contextlib.suppress(BrokenPipeError):
                    start.send(getattr(self._prepare, "needs_torch", False))
                    start.send(_OF_DICOM if "pydicom" in sys.modules else ())
                    start.send(self._prepare)
                for _ in range(self._processes):
                    self._idle.put(self._forked())
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes > 1:
            self._control.close()  # the parent ends, and each process once its link is closed
            while not self._idle.empty():
                self._idle.get().close()
            self._parent.wait()

    def read(self, loads: Sequence[Load]) -> list[Answer]:
        """Read pictures, in order. Thread-safe; waits while all processes are at work.

        Args:
            loads: each gives (h, w) or (h, w, 3) uint8, or raises `DataError`.

        Returns:
            An answer for each. One that ends two processes, one after the other, is said to have crashed.

        Raises:
            DataError: the processes can't be started any more.
            RuntimeError: a load raised an error that is no `DataError`: a fault of the program.
        """
        if self._processes == 1:
            return [_read(load, self._prepare) for load in loads]
        answers: list[Answer] = []
        link, sent, ended = self._idle.get(), False, 0
        try:
            while len(answers) < len(loads):
                try:
                    if not sent:
                        link.send(loads[len(answers) :])
                        sent = True
                    answer = _received(link)
                except (EOFError, OSError):
                    link.close()
                    link, sent, ended = self._forked(), False, ended + 1
                    if ended < 2:  # an idle process may have been ended too, and no file is to blame
                        continue
                    answer = Answer(None, _CRASHED)
                if isinstance(answer, Exception):
                    raise answer
                answers.append(answer)
                ended = 0
            return answers
        except BaseException:
            link.close()  # what it still says is nobody's answer
            raise
        finally:
            self._idle.put(link)

    def _forked(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _AHEAD)
            try:
                socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise DataError(
                    "the process that starts the decoders has ended (it may have had too little memory); what is "
                    "finished is kept: run the same command again"
                ) from None
        return Connection(ours.detach())


def _read(load: Load, prepare: Prepare) -> Answer:
    """Read one picture; whatever a foreign processor raises over it costs this image alone."""
    try:
        image = load()
    except DataError as error:
        return Answer(None, str(error))
    try:
        return Answer(prepare(image), "", isinstance(image, Shallow))
    except DataError as error:
        return Answer(None, str(error))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        return Answer(None, f"the encoder can't prepare it ({type(error).__name__}: {reason})")


def serve() -> None:
    """Be the process that the decoders are forks of: one for each socket that comes through standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not leave a picture on the disk
    warnings.simplefilter("ignore")  # a damaged file's warning may quote its header
    control = socket.socket(fileno=0)
    with Connection(os.dup(0)) as start:
        if not start.recv():
            sys.modules["torch"] = None  # type: ignore[assignment] # what imports it where it is found does without
        for name in start.recv():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        prepare = start.recv()
    with tempfile.TemporaryFile() as lock:
        one_large_in_all(lock)
        while True:
            _, links, _, _ = socket.recv_fds(control, 1, 1)
            if not links:
                break
            _reap(os.WNOHANG)
            if os.fork() == 0:
                control.close()
                try:
                    _work(Connection(links[0]), prepare)
                finally:
                    os._exit(0)
            os.close(links[0])
    _reap(0)


def _reap(how: int) -> None:
    """Take the decoders that have ended off the system's list, or wait for all (0): each ends with its link."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, how)[0]:
            pass


def _work(link: Connection, prepare: Prepare) -> None:
    """Answer for each picture that is asked for, until the other side is gone."""
    while True:
        try:
            loads = link.recv()
        except (EOFError, OSError):
            return
        except Exception as error:
            loads = [_raising(error)]
        for load in loads:
            signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # SIGPROF ends the process; waiting for a disk costs nothing
            try:
                answer: Answer | Exception = _read(load, prepare)
            except Exception as error:
                answer = RuntimeError(f"{type(error).__name__}: {error}")
            try:
                _send(link, answer)
            except OSError:
                return


def _send(link: Connection, answer: Answer | Exception) -> None:
    """Send an answer, its row as bytes of their own: pickled they would be copied three times more."""
    if isinstance(answer, Exception) or answer.row is None:
        link.send((answer, None))
        return
    link.send((answer._replace(row=None), (answer.row.shape, answer.row.dtype)))
    rest = np.ascontiguousarray(answer.row).reshape(-1).view(np.uint8).data
    while rest:
        rest = rest[os.write(link.fileno(), rest) :]


def _received(link: Connection) -> Answer | Exception:
    """Take the answer that `_send` sent; EOFError or OSError where the other side ended before its last byte."""
    answer: Answer | Exception
    answer, form = link.recv()
    if form is None or isinstance(answer, Exception):
        return answer
    row = np.empty(*form)
    rest = row.reshape(-1).view(np.uint8).data
    while rest:
        count = os.readv(link.fileno(), [rest])
        if count == 0:
            raise EOFError
        rest = rest[count:]
    return answer._replace(row=row)


def _raising(error: Exception) -> Load:
    def load() -> NDArray[np.uint8]:
        raise error

    return load
