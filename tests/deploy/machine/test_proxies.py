"""Which proxy a link takes: as gRPC itself does, found by trying it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.machine.environment import flower_environment
from deploy.machine.proxies import direct_locally, ignored, proxy_of

URL = "http://127.0.0.1:PORT"

# what gRPC 1.85 did with a host and these variables: True where it asked the proxy
TRIED: list[tuple[str, dict[str, str], bool]] = [
    ("127.0.0.1", {}, False),
    ("127.0.0.1", {"http_proxy": URL}, True),
    ("127.0.0.1", {"https_proxy": URL}, True),
    ("127.0.0.1", {"grpc_proxy": URL}, True),
    ("127.0.0.1", {"HTTPS_PROXY": URL}, False),
    ("127.0.0.1", {"all_proxy": URL}, False),
    ("127.0.0.1", {"grpc_proxy": "", "https_proxy": URL}, False),
    ("127.0.0.1", {"grpc_proxy": "rubbish", "https_proxy": URL}, False),
    ("127.0.0.1", {"https_proxy": "https://127.0.0.1:PORT"}, False),
    ("127.0.0.1", {"https_proxy": "127.0.0.1:PORT"}, False),
    ("127.0.0.1", {"https_proxy": "HTTP://127.0.0.1:PORT"}, True),
    ("127.0.0.1", {"https_proxy": "http:127.0.0.1:PORT"}, False),
    ("127.0.0.1", {"https_proxy": " http://127.0.0.1:PORT"}, False),
    ("127.0.0.1", {"https_proxy": "http://127.0.0.1:PORT "}, True),
    ("127.0.0.1", {"https_proxy": "http://127.0.0.1:PORT/path?x"}, True),
    ("127.0.0.1", {"https_proxy": "http://user@127.0.0.1:PORT"}, True),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": "127.0.0.1"}, False),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": "x, 127.0.0.1 "}, False),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": "127.0.0.0/8"}, False),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": "127.1.0.0/8"}, False),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": "127.0.0.1/33"}, False),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": "10.0.0.0/8"}, True),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": "0.0.1"}, False),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": "*"}, True),
    ("127.0.0.1", {"https_proxy": URL, "no_proxy": ""}, True),
    ("127.0.0.1", {"https_proxy": URL, "NO_PROXY": "127.0.0.1"}, True),
    ("127.0.0.1", {"https_proxy": URL, "no_grpc_proxy": "127.0.0.1"}, False),
    ("127.0.0.1", {"https_proxy": URL, "no_grpc_proxy": "x", "no_proxy": "127.0.0.1"}, True),
    ("127.0.0.1", {"https_proxy": URL, "no_grpc_proxy": "", "no_proxy": "127.0.0.1"}, True),
    ("localhost", {"https_proxy": URL, "no_proxy": "LOCALHOST"}, False),
    ("localhost", {"https_proxy": URL, "no_proxy": "host"}, True),
    ("localhost", {"https_proxy": URL, "no_proxy": ".localhost"}, False),
    ("localhost", {"https_proxy": URL, "no_proxy": "127.0.0.1"}, True),
    ("localhost", {"https_proxy": URL, "no_proxy": "*localhost"}, True),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": "ample.org"}, True),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": "*.example.org"}, True),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": "fl.example.org."}, True),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": "fl.example.org:443"}, True),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": "..example.org"}, True),
    ("::1", {"https_proxy": URL}, True),
    ("::1", {"https_proxy": URL, "no_proxy": "[::1]"}, True),
]
# the same, but that a direct link to such a host can't be seen in a test
UNSEEN: list[tuple[str, dict[str, str], bool]] = [
    ("fl.example.org", {"https_proxy": URL, "no_proxy": ".example.org"}, False),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": "example.org"}, False),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": "EXAMPLE.org"}, False),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": ".org"}, False),
    ("fl.example.org", {"https_proxy": URL, "no_proxy": "x,,example.org"}, False),
    ("::1", {"https_proxy": URL, "no_proxy": "::1"}, False),
    ("::1", {"https_proxy": URL, "no_proxy": "::/0"}, False),
]


class _Doors:
    """One listener for each case: which of them heard something."""

    def __init__(self) -> None:
        self.heard: set[int] = set()
        self.sockets: list[socket.socket] = []

    def open(self) -> int:
        one = socket.create_server(("127.0.0.1", 0))
        self.sockets.append(one)
        port = int(one.getsockname()[1])

        def wait() -> None:
            try:
                raw, _ = one.accept()
                raw.close()
                self.heard.add(port)
            except OSError:
                return

        threading.Thread(target=wait, daemon=True).start()
        return port


@pytest.fixture
def doors() -> Iterator[_Doors]:
    found = _Doors()
    yield found
    for one in found.sockets:
        one.close()


def _with_port(variables: dict[str, str], port: int) -> dict[str, str]:
    return {name: text.replace("PORT", str(port)) for name, text in variables.items()}


@pytest.mark.parametrize(("host", "variables", "wanted"), [*TRIED, *UNSEEN])
def test_proxy_of_reads_the_variables_as_grpc_does(host: str, variables: dict[str, str], wanted: bool) -> None:
    found = proxy_of(host, _with_port(variables, 3128))
    assert (found is not None) == wanted
    if found is not None:
        assert (found.host, found.port) == ("127.0.0.1", 3128)
        assert found.variable in variables


def test_grpc_itself_takes_the_proxies_that_the_table_says(doors: _Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    import grpc

    for host, variables, through in TRIED:
        for name in [name for name in os.environ if "proxy" in name.lower()]:
            monkeypatch.delenv(name)
        proxy, direct = doors.open(), doors.open()
        for name, text in _with_port(variables, proxy).items():
            monkeypatch.setenv(name, text)
        channel = grpc.insecure_channel(f"[{host}]:{direct}" if ":" in host else f"{host}:{direct}")
        call = channel.unary_unary("/a/b").future(b"", timeout=120, wait_for_ready=True)
        end = time.monotonic() + 120
        while not doors.heard & {proxy, direct} and time.monotonic() < end:
            time.sleep(0.005)
        call.cancel()
        channel.close()
        assert doors.heard & {proxy, direct} == {proxy if through else direct}, (host, variables)


def test_proxy_asks_with_the_credentials_and_shows_none() -> None:
    found = proxy_of("x", {"https_proxy": "http://a%3ab:c%20d@proxy.example.org"})
    assert found is not None
    assert found.port == 443
    assert found.request("x:1") == (
        b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\nProxy-Authorization: Basic YTpiOmMgZA==\r\n\r\n"
    )


def test_ignored_names_variables_of_another_spelling() -> None:
    assert ignored({"HTTPS_PROXY": URL, "PATH": "x"}) == ["HTTPS_PROXY"]
    assert ignored({"https_proxy": "proxy:3128"}) == ["https_proxy"]
    assert ignored({"https_proxy": "http://proxy:3128"}) == ignored({}) == ignored({"https_proxy": ""}) == []


@pytest.mark.parametrize("before", [{}, {"no_proxy": "example.org"}, {"no_grpc_proxy": "a", "no_proxy": "b"}])
def test_local_links_take_no_proxy(before: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"https_proxy": "http://proxy:3128", **before}
    after = variables | direct_locally(variables)
    for host in ("127.0.0.1", "localhost", "::1"):
        assert proxy_of(host, after) is None
    for host in ("fl.example.org", "a", "b", "c"):
        assert proxy_of(host, after) == proxy_of(host, variables)
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_of("127.0.0.1", flower_environment(Path("x"))) is None
    assert proxy_of("127.0.0.1", flower_environment(Path("x"), local=False)) is not None
