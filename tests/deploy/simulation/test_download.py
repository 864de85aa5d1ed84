"""`fedhypevae download`, against a publisher on this machine's own loopback."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from common.config.presets import resolve_listed
from common.errors import DataError, FedHypeVAEError
from deploy.simulation.download import SOURCES, RemoteFile, Source, download, fetch, unpack
from tests.deploy.test_app_settings import listed

TOOL = Path(sys.executable).parent / "fedhypevae"
ROOT = Path(__file__).resolve().parents[3]
CONTENT = bytes(range(256)) * 40


class _Publisher(http.server.ThreadingHTTPServer):
    """Serves `files`, each answer cut off after `cut` bytes; notes in `asked` where each transfer began."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files, self.cut = {"file.bin": CONTENT}, 1 << 30
        self.asked: list[int] = []


class _Answer(http.server.BaseHTTPRequestHandler):
    server: _Publisher

    def do_GET(self) -> None:
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.server.asked.append(start)  # before the last byte: the client may go on once it has that
        self.wfile.write(content[start : start + self.server.cut])

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Keep quiet."""


@pytest.fixture
def publisher() -> Iterator[_Publisher]:
    server = _Publisher()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _remote(publisher: _Publisher, name: str, md5: str | None = None) -> RemoteFile:
    return RemoteFile(name, f"http://127.0.0.1:{publisher.server_port}/{name}", md5)


def test_fetch_goes_on_where_a_transfer_broke_off(publisher: _Publisher, tmp_path: Path) -> None:
    file = _remote(publisher, "file.bin", hashlib.md5(CONTENT).hexdigest())
    told: list[int] = []
    publisher.cut = 1000
    with pytest.raises(FedHypeVAEError, match="again"):
        fetch(file, tmp_path, lambda name, size: told.append)
    assert not (tmp_path / "file.bin").exists()
    publisher.cut = 1 << 30
    told.clear()
    fetch(file, tmp_path, lambda name, size: told.append)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert publisher.asked == [0, 1000]
    assert sum(told) == len(CONTENT)


def test_fetch_begins_anew_after_a_part_that_is_too_long(publisher: _Publisher, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"x")
    with pytest.raises(FedHypeVAEError, match="again"):
        fetch(_remote(publisher, "file.bin"), tmp_path, lambda name, size: lambda count: None)
    fetch(_remote(publisher, "file.bin"), tmp_path, lambda name, size: lambda count: None)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_fetch_removes_a_file_with_another_sum(publisher: _Publisher, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected MD5 00"):
        fetch(_remote(publisher, "file.bin", "00"), tmp_path, lambda name, size: lambda count: None)
    assert list(tmp_path.iterdir()) == []


def test_fetch_says_what_cannot_be_reached(publisher: _Publisher, tmp_path: Path) -> None:
    with pytest.raises(FedHypeVAEError, match="404"):
        fetch(_remote(publisher, "missing.bin"), tmp_path, lambda name, size: lambda count: None)


def _zip(entries: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return sink.getvalue()


def _milk(publisher: _Publisher) -> Source:
    source = SOURCES["milk10k"]
    archive, truth, rows = (file.name for file in source.files)
    images = {f"Input/L{lesion}/ISIC_{lesion}{view}.jpg": b"jpeg" for lesion in (1, 2) for view in (0, 1)}
    publisher.files = {
        archive: _zip({**images, "Input/L9/ISIC_99.jpg": b"jpeg", "Input/readme.txt": b"text"}),
        truth: b"lesion_id,AKIEC,BCC\nL1,0.0,1.0\nL2,1.0,0.0\n",
        rows: b"lesion_id,isic_id\nL1,ISIC_10\nL1,ISIC_11\nL2,ISIC_20\nL2,ISIC_21\n",
    }
    return dataclasses.replace(source, files=tuple(_remote(publisher, file.name) for file in source.files))


def test_download_makes_the_label_file_of_milk10k(publisher: _Publisher, tmp_path: Path) -> None:
    source = _milk(publisher)
    for _ in range(2):  # the second time nothing is fetched
        download(source, tmp_path, lambda name, size: lambda count: None)
    assert len(publisher.asked) == 3
    assert (tmp_path / "labels.csv").read_text().split() == [
        "path,label,patient",
        "Input/L1/ISIC_10.jpg,BCC,L1",
        "Input/L1/ISIC_11.jpg,BCC,L1",
        "Input/L2/ISIC_20.jpg,AKIEC,L2",
        "Input/L2/ISIC_21.jpg,AKIEC,L2",
    ]
    assert (tmp_path / "images" / "Input" / "L9" / "ISIC_99.jpg").is_file()
    assert not (tmp_path / "images" / "Input" / "readme.txt").exists()


def test_download_refuses_a_lesion_with_two_diagnoses(publisher: _Publisher, tmp_path: Path) -> None:
    source = _milk(publisher)
    publisher.files[source.files[1].name] = b"lesion_id,AKIEC,BCC\nL1,1.0,1.0\n"
    with pytest.raises(DataError, match="one diagnosis of lesion L1, found 2"):
        download(source, tmp_path, lambda name, size: lambda count: None)
    assert not (tmp_path / "labels.csv").exists()


def test_unpack_refuses_a_path_out_of_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "bad.zip"
    archive.write_bytes(_zip({"a.jpg": b"", "../b.jpg": b""}))
    with pytest.raises(DataError, match="leads out"):
        unpack(archive, tmp_path / "images")
    assert not (tmp_path / "images").exists()
    archive.write_bytes(b"no zip")
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "images")
    archive.write_bytes(_zip({"a.jpg": b"x"}))
    assert unpack(archive, tmp_path / "images") == [PurePosixPath("a.jpg")]


@pytest.mark.parametrize(
    ("arguments", "words"), [(["mnist"], "organsmnist, milk10k"), (["milk10k"], "licence was not accepted")]
)
def test_download_refuses_with_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [TOOL, "download", *arguments],
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_settings_of_a_source_are_a_valid_run(source: Source) -> None:
    settings = tomllib.loads((ROOT / source.settings).read_text())
    assert settings.keys() <= listed().keys()  # Flower refuses others
    config = resolve_listed(settings)
    assert (config.privacy.epsilon, config.privacy.delta, config.federation.num_sites) == (1.0, 1e-4, 10)
    assert config.federation.pool == f"downloads/{source.name}.parquet"
