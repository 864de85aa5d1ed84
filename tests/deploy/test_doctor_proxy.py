"""The doctor takes the way to the server that the node takes: through the proxy that gRPC would ask."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.coordinator.provision import FederationPlan, provision
from deploy.machine.reach import examine_link
from tests.deploy.test_doctor import Listener
from tests.ports import free_ports


class Forwarder:
    """An HTTP proxy: it opens the link that it is asked for, or answers with a refusal."""

    def __init__(self, answer: bytes, target: int | None = None) -> None:
        self.asked: list[bytes] = []
        self._answer, self._target = answer, target
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://me:secret@127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                raw, _ = self._socket.accept()
            except OSError:
                return
            self.asked.append(raw.recv(4096))
            raw.sendall(self._answer)
            if self._target is None:
                raw.close()
                continue
            other = socket.create_connection(("127.0.0.1", self._target))
            for one, two in ((raw, other), (other, raw)):
                threading.Thread(target=_pass_on, args=(one, two), daemon=True).start()

    def close(self) -> None:
        self._socket.close()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65_536):
            sink.sendall(piece)
    except OSError:
        pass
    finally:
        sink.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    out = tmp_path_factory.mktemp("federation") / "out"
    names = ["localhost", "fl.example.org", "::1"]
    provision(FederationPlan(name="trial", server_names=names, sites=["st-anna"]), out)
    listener = Listener(out / "server")
    yield out / "server" / "ca.crt", listener.port
    listener.close()


@pytest.fixture
def unused() -> str:
    return f"http://127.0.0.1:{free_ports(1)[0]}"


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_examine_link_names_the_variable_of_a_proxy_that_is_not_there(
    server: tuple[Path, int], unused: str, variable: str
) -> None:
    ca, port = server
    assert list(examine_link(f"localhost:{port}", ca, {})) == []
    (line,) = examine_link(f"localhost:{port}", ca, {variable: unused})
    assert f"{variable} is set" in line
    assert "set no_proxy=localhost" in line
    assert list(examine_link(f"localhost:{port}", ca, {variable: unused, "no_proxy": "localhost"})) == []


def test_examine_link_goes_through_a_proxy_that_is_the_only_way(server: tuple[Path, int]) -> None:
    ca, port = server
    proxy = Forwarder(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n", port)
    assert list(examine_link("fl.example.org:9092", ca, {"https_proxy": proxy.url})) == []
    assert proxy.asked[0].startswith(b"CONNECT fl.example.org:9092 HTTP/1.1\r\n")
    assert b"\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n" in proxy.asked[0]
    assert list(examine_link("[::1]:9092", ca, {"https_proxy": proxy.url})) == []
    assert proxy.asked[1].startswith(b"CONNECT [::1]:9092 HTTP/1.1\r\n")
    proxy.close()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407 Proxy Authentication Required"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "403 Forbidden"),
        (b"", "the proxy answers ''"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "SSH-2.0-OpenSSH"),
        (b"\xff" * 100, "the proxy answers"),
    ],
)
def test_examine_link_says_what_a_proxy_answers_and_no_secret(
    server: tuple[Path, int], answer: bytes, told: str
) -> None:
    ca, port = server
    proxy = Forwarder(answer)
    (line,) = examine_link(f"localhost:{port}", ca, {"https_proxy": proxy.url})
    assert told in line
    assert "https_proxy is set" in line
    assert "secret" not in line
    assert "\n" not in line
    proxy.close()


def test_examine_link_names_variables_that_grpc_does_not_take(server: tuple[Path, int]) -> None:
    ca, port = server
    for variables in ({"HTTPS_PROXY": "http://proxy:1"}, {"https_proxy": "proxy:1"}):
        assert list(examine_link(f"localhost:{port}", ca, variables)) == []
        (closed,) = free_ports(1)
        (line,) = examine_link(f"localhost:{closed}", ca, variables)
        assert "nobody listens" in line
        assert f"{next(iter(variables))} is set" in line


def test_examine_link_names_the_proxy_where_it_ends_the_tls(server: tuple[Path, int], tmp_path: Path) -> None:
    ca, port = server
    provision(FederationPlan(name="other", server_names=["localhost"], sites=["st-anna"]), tmp_path / "out")
    stranger = Listener(tmp_path / "out" / "server")
    proxy = Forwarder(b"HTTP/1.0 200 OK\r\n\r\n", stranger.port)
    (line,) = examine_link(f"localhost:{port}", ca, {"http_proxy": proxy.url})
    assert "not signed by the authority" in line
    assert "http_proxy is set" in line
    proxy.close()
    stranger.close()


def test_site_start_hands_the_proxy_to_the_supernode_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.coordinator.folder import ServerFolder
    from deploy.machine.proxies import proxy_of
    from deploy.site.folder import SiteFolder

    provision(FederationPlan(name="trial", server_names=["localhost"], sites=["st-anna"]), tmp_path / "out")
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    site = SiteFolder(tmp_path / "out" / "sites" / "st-anna")
    environment = site.environment()
    found = {one.name: proxy_of("127.0.0.1", {**environment, **one.environment}) for one in site.programs()}
    assert found["supernode"] is not None
    assert found["app"] is None
    assert proxy_of("127.0.0.1", ServerFolder(tmp_path / "out" / "server").environment()) is None
