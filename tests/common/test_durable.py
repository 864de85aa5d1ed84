"""Files whole or not at all, with their permissions; and secrets that go for good."""

from __future__ import annotations

from pathlib import Path

from common.durable import erase, write_atomically


def test_write_replaces_the_whole_and_sets_permissions(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_erase_overwrites_before_it_removes(tmp_path: Path) -> None:
    path, twin = tmp_path / "secret", tmp_path / "twin"
    path.write_bytes(b"secret")
    twin.hardlink_to(path)
    erase(path)
    assert not path.exists()
    assert twin.read_bytes() == bytes(6)
    erase(path)  # nothing there, nothing to do
