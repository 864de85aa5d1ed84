"""Starts a site's apps warm: one process has imported the libraries, and a fork of it runs each message.

Flower starts a process for every message, and most of a message's time went into importing torch and Flower. The
site's `flwr-clientapp` (`deploy.site.warm.client`) hands the message to this program, which forks; the child runs
`deploy.site.app_guard` exactly as a fresh process would, with the request's arguments, environment, folder and outputs.

Nothing passes from one message to the next, since every child is a fork of the same process, which has run none. That
process stays fit to be forked: one thread, no operation of torch's, no connection, and none of the modules that an app
brings (`app_guard` says why). It looks before each fork; where it is not fit it declines, and the message starts cold.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.machine.supervise import end_with_parent
from deploy.site.warm.child import receive, run_and_end
from deploy.site.warm.client import SOCKET

# What messages import. Not opendp: it draws noise, and whether its generator may be forked is not ours to say.
MODULES = (
    "flwr.supernode.cli.flwr_clientapp",
    "flwr.app",
    "flwr.clientapp",
    "deploy.site.app_guard",
    "torch",
    "numpy.random",
    "randomgen",
    "pyarrow.parquet",
    "safetensors.torch",
    "sqlite3",
    "scipy.special",
    "scipy.stats",
    "scipy.optimize",
    "pandas",
    "sklearn.linear_model",
    "dp_accounting.pld.privacy_loss_distribution",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.serialization",
)
APP_PACKAGES = ("common", "client_app", "server_app", "embeddings")
# Libraries that start threads when they are loaded don't with these, which are taken back afterwards. numpy's products
# have one thread in a warm message, therefore; torch's have as many as ever.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_GRACE_S = 5.0
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def serve(folder: Path, run: Callable[[], None], modules: Sequence[str] = MODULES) -> None:
    """Run `run` in a fork of this process for every message, until SIGTERM or until what is installed has changed.

    Args:
        folder: where the socket lies; made for its owner alone.
        run: what a child does; it ends as a program would that does this.
        modules: what is imported in advance; those that are not installed are left out.

    Raises:
        OSError: no socket can lie in the folder. Every message then starts cold.
    """
    listener = _bind(folder)  # before the imports: a folder that can hold no socket is reported at once
    environment = dict(os.environ)
    os.environ.update(_ONE_THREAD)
    for name in modules:
        with suppress(ImportError):
            importlib.import_module(name)
    for name in _ONE_THREAD:
        _restore(name, environment)
    gc.collect()
    gc.freeze()  # what is here already is not walked, and so not copied, in every child
    if _Starter(folder, listener, environment).work():
        run_and_end(run)


class _Starter:
    """The socket, the children with their connections, and the reason to stop, if any."""

    def __init__(self, folder: Path, listener: socket.socket, environment: Mapping[str, str]) -> None:
        self.folder, self.listener, self.environment = folder, listener, environment
        self.children: dict[int, socket.socket] = {}
        self.installed = installed()
        self.stopping = ""
        self.deadline: float | None = None

    def work(self) -> bool:
        """Fork for every message. True in a child that is to run its message; False when the work is done."""
        woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in _HANDLED:
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self.listener.listen(32)
        print(f"ready: {self._unfit() or 'messages start warm'}", flush=True)
        while not self.stopping or self.children:
            for descriptor in self._wait(woken):
                if descriptor == woken:
                    with suppress(BlockingIOError):
                        os.read(woken, 4096)
                elif descriptor == self.listener.fileno():
                    if self._accept(woken, waker):
                        return True
                else:
                    self._end_child(descriptor)
            self._reap()
            if self.stopping:
                self._wind_up()
        return False

    def _on_signal(self, number: int, frame: object) -> None:
        del frame
        if number != signal.SIGCHLD:
            self.stopping = self.stopping or signal.Signals(number).name

    def _wait(self, woken: int) -> list[int]:
        """Descriptors with news: a signal, a message, or a client that is gone."""
        poll = select.poll()
        poll.register(woken, select.POLLIN)
        if not self.stopping:
            poll.register(self.listener, select.POLLIN)
        for link in self.children.values():
            if link.fileno() >= 0:
                poll.register(link, select.POLLRDHUP)  # what a client says is for its child to read
        wait_ms = None if self.deadline is None else max(0.0, self.deadline - time.monotonic()) * 1000
        return [descriptor for descriptor, _ in poll.poll(wait_ms)]

    def _accept(self, woken: int, waker: int) -> bool:
        """Fork for one message; True in the child. A closed connection tells the client to start cold."""
        link, _ = self.listener.accept()
        if installed() != self.installed:
            self.stopping = "what is installed has changed"
        reason = self.stopping or self._unfit()
        if reason:
            print(f"a message starts cold: {reason}", flush=True)
            link.close()
            return False
        starter = os.getpid()
        sys.stdout.flush()
        process = os.fork()
        if process:
            self.children[process] = link
            return False
        try:
            signal.set_wakeup_fd(-1)
            for number in _HANDLED:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.setsid()
            end_with_parent()
            for other in (self.listener, *self.children.values()):
                other.close()
            os.close(woken)
            os.close(waker)
            if os.getppid() != starter:  # it died before this process was bound to it
                os._exit(1)
            receive(link, self.environment)
        except BaseException as error:
            print(f"a message starts cold: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        return True

    def _unfit(self) -> str:
        """Why this process must not be forked, in words; empty if it may."""
        tasks = len(list(Path("/proc/self/task").iterdir()))
        if threading.active_count() != 1 or tasks != 1:
            return f"the starter has {tasks} threads, and a fork copies one"
        loaded = [name for name in APP_PACKAGES if name in sys.modules]
        if loaded:
            return f"{loaded[0]} is loaded in the starter, and would run in place of the app's own"
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return "CUDA is in use in the starter, and can't be used after a fork"
        return ""

    def _end_child(self, descriptor: int) -> None:
        """A client that is gone takes its message along, as if it had run it itself."""
        for process, link in self.children.items():
            if link.fileno() == descriptor:
                link.close()
                _kill(process, signal.SIGKILL)

    def _reap(self) -> None:
        """Tell the clients of ended children how they ended."""
        for process, link in list(self.children.items()):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
                with suppress(OSError):
                    link.sendall(b"x%d\n" % (code if code >= 0 else 128 - code))
                link.close()
                del self.children[process]

    def _wind_up(self) -> None:
        """Take no more; on a signal, ask the running ones to end, and end them after a while."""
        if self.listener.fileno() >= 0:
            (self.folder / SOCKET).unlink(missing_ok=True)
            self.listener.close()
        if self.stopping not in signal.Signals.__members__:
            return
        late = self.deadline is not None and time.monotonic() >= self.deadline
        if late or self.deadline is None:
            for process in self.children:
                _kill(process, signal.SIGKILL if late else signal.SIGTERM)
            self.deadline = time.monotonic() + _GRACE_S


def installed() -> tuple[tuple[int, int, int] | None, ...]:
    """What would be loaded now: other after packages were installed, or the interpreter or these modules replaced."""
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    ours = sorted(str(path) for path in Path(__file__).parents[2].rglob("*.py"))
    return tuple(_stamp(Path(place)) for place in (sys.executable, f"{sys.prefix}/pyvenv.cfg", *packages, *ours))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _bind(folder: Path) -> socket.socket:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    listener, here = socket.socket(socket.AF_UNIX), os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir(folder)  # an address holds 107 bytes, which a folder's whole path may exceed
        Path(SOCKET).unlink(missing_ok=True)  # of a starter that was killed
        listener.bind(SOCKET)
        Path(SOCKET).chmod(0o600)
    finally:
        os.fchdir(here)
        os.close(here)
    return listener


def _kill(process: int, number: int) -> None:
    """To a child and what it started; a child that has not made its group yet is alone."""
    for send in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            send(process, number)


def _restore(name: str, environment: Mapping[str, str]) -> None:
    if name in environment:
        os.environ[name] = environment[name]
    else:
        del os.environ[name]


def main() -> None:
    """`python -P -m deploy.site.warm.starter FOLDER`: serve the site's apps from a socket in that folder."""
    from deploy.site.app_guard import main as guarded

    serve(Path(sys.argv[1]), guarded)


if __name__ == "__main__":
    main()
