"""The warm starter: a message runs as a fresh process would run it, once, and takes nothing from another one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.site.warm.client import SOCKET
from tests.deploy.site.warm.warm_cases import COLD, GUARDED, PATIENCE_S, ROOT, Place, end, lives, wait

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the starter needs Linux")
# A signal that comes after Python has looked for one and before it blocks: the two calls of a map are made by C alone.
LATE_SIGNAL = """
import ctypes, functools, operator, os, select, signal, sys, types
import deploy.site.warm.client as client

class Poll:
    def __init__(self):
        self.inner = poll()
        self.register, self.before = self.inner.register, [functools.partial(kill, os.getpid(), signal.SIGTERM)]

    def poll(self):
        calls, self.before = [*self.before, self.inner.poll], []
        return [*map(operator.call, calls)][-1]

poll, kill = select.poll, ctypes.CDLL(None).kill
client.select = types.SimpleNamespace(poll=Poll, POLLIN=select.POLLIN)
client.main()
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_message_gets_arguments_environment_folder_and_outputs(place: Place) -> None:
    body = 'print(json.dumps([sys.argv[1:], os.environ["ODD"], os.getcwd(), "GONE" in os.environ]))\n'
    body += 'print("to errors", file=sys.stderr); sys.exit(7)'
    place.environment["GONE"] = "x"
    with place.starter(body):
        del place.environment["GONE"]
        code, output, errors = place.message("--token", "a b", "", "é", more={"ODD": "x=1\n\udcff "})
    assert json.loads(output) == [["--token", "a b", "", "é"], "x=1\n\udcff ", str(place.folder), False]
    assert (code, errors, place.marks()) == (7, "to errors\n", ["warm"])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pass", 0),
        ("raise ValueError('no')", 1),
        ("sys.exit('no')", 1),
        ("sys.exit(256 + 4)", 4),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_message_ends_as_its_process_ended(place: Place, body: str, code: int) -> None:
    with place.starter(body):
        assert place.message()[0] == code
        assert place.message()[0] == code
    assert place.marks() == ["warm"] * 2


def test_message_ends_when_its_threads_have_and_its_exit_functions_ran(place: Place) -> None:
    body = "import atexit, concurrent.futures\natexit.register(print, 'last')\n"
    body += "pool = concurrent.futures.ThreadPoolExecutor()\npool.submit(lambda: (time.sleep(0.3), print('thread')))\n"
    body += "sys.exit(6)"
    with place.starter(body):
        assert place.message() == (6, "thread\nlast\n", "")


def test_messages_run_side_by_side(place: Place) -> None:
    with place.starter("sys.exit(int(sys.argv[1]))"):
        clients = [place.client(str(number)) for number in range(8)]
        assert [client.wait(PATIENCE_S) for client in clients] == list(range(8))


def test_long_folder_and_modes(place: Place, tmp_path: Path) -> None:
    long = Place(tmp_path / ("d" * 100) / ("e" * 100))
    with long.starter("print('here')"):
        assert long.message() == (0, "here\n", "")
        assert long.run.stat().st_mode & 0o777 == 0o700
        assert (long.run / SOCKET).stat().st_mode & 0o777 == 0o600


@pytest.fixture
def sleeping(place: Place) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[str], int, int]]:
    """Starter, client, the process of its message, and a program which that one started."""
    body = "other = subprocess.Popen(['sleep', '600'])\nprint(other.pid, os.getpid(), flush=True)\ntime.sleep(600)"
    with place.starter(body) as starter:
        client = place.client()
        assert client.stdout is not None
        other, process = map(int, client.stdout.readline().split())
        yield starter, client, process, other
        end(other)
        end(process)
        end(client.pid)
        client.communicate()


Sleeping = tuple[subprocess.Popen[bytes], subprocess.Popen[str], int, int]


def test_killed_client_takes_its_message_along(place: Place, sleeping: Sleeping) -> None:
    _, client, process, other = sleeping
    client.kill()
    wait(lambda: not Path(f"/proc/{process}").exists() and not lives(other))  # the entry goes once it was asked about


def test_killed_starter_takes_messages_along_and_none_runs_twice(place: Place, sleeping: Sleeping) -> None:
    starter, client, process, other = sleeping
    starter.kill()
    wait(lambda: not lives(process))
    end(other)  # as when a cold message is killed, what it started is left
    assert "not run again" in client.communicate(timeout=PATIENCE_S)[1]
    assert client.returncode == 1
    assert place.marks() == ["warm"]


def test_stopped_starter_ends_its_messages_and_leaves_no_socket(place: Place, sleeping: Sleeping) -> None:
    starter, client, process, _ = sleeping
    starter.terminate()
    assert client.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert starter.wait(PATIENCE_S) == 0
    assert not lives(process)
    assert not (place.run / SOCKET).exists()


def test_signals_to_the_client_reach_the_app(place: Place) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); print('up', flush=True)\n"
    body += "while True: time.sleep(0.05)"  # one long sleep may begin with the signal taken and unseen
    with place.starter(body):
        client = place.client()
        assert client.stdout is not None
        client.stdout.readline()
        client.terminate()
        assert client.wait(PATIENCE_S) == 9
        client.communicate()


def test_signal_that_comes_as_the_client_begins_to_wait_reaches_the_app(place: Place) -> None:
    with place.starter("time.sleep(600)"):
        command = [sys.executable, "-c", LATE_SIGNAL, str(place.run)]
        ended = subprocess.run(command, env=place.environment, check=False, timeout=PATIENCE_S)
    assert ended.returncode == 128 + signal.SIGTERM


def test_message_starts_cold_where_there_is_no_starter(place: Place) -> None:
    assert place.message()[0] == COLD
    with place.starter("pass"):
        pass
    assert (place.run / SOCKET).exists()  # of a killed starter
    assert place.message()[0] == COLD
    with place.starter("pass"):
        assert place.message()[0] == 0
    assert place.marks() == ["cold", "cold", "warm"]


def test_message_of_a_starter_that_hangs_runs_once(place: Place) -> None:
    hasty = "import deploy.site.warm.client as client; client._HAND_OVER_S = 0.5; client.main()"
    with place.starter("pass") as starter:
        starter.send_signal(signal.SIGSTOP)
        command = [sys.executable, "-c", hasty, str(place.run)]
        assert subprocess.run(command, env=place.environment, check=False, timeout=PATIENCE_S).returncode == COLD
        starter.send_signal(signal.SIGCONT)
        assert place.message()[0] == 0  # its queue holds the other one, too
    assert place.marks() == ["cold", "warm"]


def test_nothing_runs_before_the_client_said_go(place: Place) -> None:
    silent = "import sys, deploy.site.warm.client as client; client._hand_over(sys.argv[1], [])"
    with place.starter("pass"):
        subprocess.run(
            [sys.executable, "-c", silent, str(place.run)], env=place.environment, check=True, timeout=PATIENCE_S
        )
        assert place.message()[0] == 0
    assert place.marks() == ["warm"]


@pytest.mark.parametrize(
    ("answers", "cold"), [(b"", True), (b"x1\n", True), (b"r", True), (b"r1\n", False), (b"r1\nx", False)]
)
def test_client_starts_cold_until_it_said_go_and_never_after(place: Place, answers: bytes, cold: bool) -> None:
    place.run.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.run / SOCKET))
        listener.listen()

        def answer() -> None:
            link, _ = listener.accept()
            with link:
                link.recv(8)
                link.sendall(answers)
                link.shutdown(socket.SHUT_WR)
                while link.recv(65536):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        code, _, errors = place.message()
        thread.join()
    assert code == (COLD if cold else 1)
    assert ("not run again" in errors) != cold
    assert place.marks() == (["cold"] if cold else [])


UNFIT = {
    "2 threads": ("threading.Thread(target=time.sleep, args=(600,), daemon=True).start()", ()),
    "common is loaded": ("", ("common.errors",)),
    "CUDA is in use": (
        "import types; sys.modules['torch'] = types.SimpleNamespace("
        "cuda=types.SimpleNamespace(is_initialized=lambda: True))",
        (),
    ),
}


@pytest.mark.parametrize("why", UNFIT)
def test_starter_that_must_not_fork_declines(place: Place, why: str) -> None:
    before, modules = UNFIT[why]
    with place.starter("pass", before=before, modules=modules):
        assert place.message()[0] == COLD
    assert why in place.said
    assert place.marks() == ["cold"]


def test_settings_that_libraries_read_as_they_load_are_kept(place: Place) -> None:
    with place.starter("pass"):
        assert place.message(more={"OMP_NUM_THREADS": "3"})[0] == COLD
        assert place.message(more={"OTHER": "3"})[0] == 0
    assert "OMP_NUM_THREADS" in place.said


def test_starter_ends_when_what_is_installed_has_changed(place: Place) -> None:
    file = place.folder / "module.py"
    file.write_text("")
    before = "from deploy.site.warm import starter; stamp = starter._stamp; "
    before += f"starter.installed = lambda: (stamp(Path({str(file)!r})),)"
    with place.starter("time.sleep(float(sys.argv[1])); sys.exit(5)", before=before) as starter:
        running = place.client("1.5")
        wait(lambda: place.marks() == ["warm"])
        file.write_text("x = 1\n")
        assert place.message("0")[0] == COLD
        assert running.wait(PATIENCE_S) == 5  # what runs is not disturbed
        running.communicate()
        assert starter.wait(PATIENCE_S) == 0
    assert "has changed" in place.said


def test_installed_sees_a_package_come_and_a_module_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deploy.site.warm import starter as warm

    packages = tmp_path / "site-packages"
    shutil.copytree(ROOT / "deploy", packages / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(warm.sysconfig, "get_path", lambda _: str(packages))
    monkeypatch.setattr(warm, "__file__", str(packages / "deploy" / "site" / "warm" / "starter.py"))
    seen = {warm.installed()}
    (packages / "torch-9.dist-info").mkdir()
    seen.add(warm.installed())
    (packages / "deploy" / "site" / "app_guard.py").write_text("")
    seen.add(warm.installed())
    assert len(seen) == 3


DRAW = """import numpy, torch
from common.privacy.noise import SecureNoise
print(json.dumps({"python": random.random(), "numpy": numpy.random.random(), "torch": torch.rand(1).item(),
                  "noise": SecureNoise().gaussian(1, 1.0).item()}))"""
LIBRARIES = ("numpy.random", "torch", "randomgen")


@pytest.mark.parametrize(
    ("broken", "shared"),
    [
        ("", set()),
        ("deploy.site.warm.child._seed = lambda: None", {"numpy", "torch"}),
        ("import secrets; secrets.randbits = random.Random(0).getrandbits", {"noise"}),
    ],
)
def test_no_generator_is_shared_by_two_messages(place: Place, broken: str, shared: set[str]) -> None:
    """The broken versions show that a fork shares what is not seeded anew, noise without fresh entropy included."""
    with place.starter(DRAW, before=broken, modules=LIBRARIES):
        first, second = (json.loads(place.message()[1]) for _ in range(2))
    assert place.marks() == ["warm", "warm"]
    assert {name for name in first if first[name] == second[name]} == shared


@pytest.mark.parametrize("guarded", [True, False])
def test_app_that_nobody_approved_is_refused(place: Place, guarded: bool) -> None:
    """The site's check runs in a warm message; the control shows what would happen without it."""
    before = GUARDED.format(path=str(ROOT / "deploy" / "site" / "app_guard.py"))
    body = "guard.main()" if guarded else "from flwr.supernode.cli.flwr_clientapp import flwr_clientapp as f; f()"
    arguments = ("--insecure", "--runtime-api-address", "127.0.0.1:9", "--token", "t", "--parent-pid", str(os.getpid()))
    place.environment["OPENBLAS_NUM_THREADS"] = "1"  # loaded before `serve` would see to it
    with place.starter(body, before=before):
        code, output, errors = place.message(*arguments, more={"FEDHYPEVAE_SITE": str(place.folder)})
    assert code == 1
    assert place.marks() == ["warm"]
    assert ("is not approved at this site" in output + errors) == guarded
    assert ("INSTALLED" in output) != guarded
    assert bool(list(place.folder.glob("apps/*.refused.fab"))) == guarded


def test_starter_of_a_site_is_fit_to_fork(place: Place) -> None:
    """With every library that a message needs, and no word about threads from outside."""
    command = [sys.executable, "-P", "-m", "deploy.site.warm.starter", str(place.run)]
    environment = {**place.environment, "PYTHONPATH": str(ROOT)}
    log = place.folder / "starter.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait(lambda: "ready: " in place.said or process.poll() is not None)
        assert place.said == "ready: messages start warm\n"
        place.environment = environment
        assert "--root-certificates" in place.message("--help", more={"FEDHYPEVAE_SITE": str(place.folder)})[1]
        assert "cold" not in place.said
    finally:
        process.kill()
        process.wait()
