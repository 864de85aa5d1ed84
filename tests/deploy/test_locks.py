"""The locked versions: what pyproject.toml asks for is in them, and they are what the tests run with."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    "site": ("offline-encoder", "dicom"),
    "server": ("release",),
    "development": ("simulation", "offline-encoder", "dicom", "release", "documentation", "development"),
}


def locked(name: str) -> dict[str, Version]:
    """The versions of a lock that hold on this machine; every entry has a hash."""
    text = (ROOT / "deploy" / "locks" / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    versions = dict[str, Version]()
    for line in text.splitlines():
        entry, *hashes = line.split(" --hash=")
        assert hashes
        assert all(one.strip().startswith("sha256:") for one in hashes)
        wanted = Requirement(entry)
        if wanted.marker is None or wanted.marker.evaluate():
            versions[wanted.name.lower()] = Version(str(wanted.specifier).removeprefix("=="))
    return versions


@pytest.mark.parametrize("name", EXTRAS)
def test_lock_holds_what_the_project_asks_for(name: str) -> None:
    versions = locked(name)
    asked = [
        *PROJECT["dependencies"],
        *(one for extra in EXTRAS[name] for one in PROJECT["optional-dependencies"][extra]),
    ]
    for wanted in map(Requirement, asked):
        if wanted.name != "torch":  # its builds differ by machine
            assert wanted.specifier.contains(versions[wanted.name.lower()]), wanted
    assert versions["cryptography"] >= Version("50")  # flwr's own bound holds it at a version with published faults
    assert not [known for known in versions if known.startswith(("torch", "nvidia", "cuda", "triton"))]


def test_tests_run_with_the_locked_versions() -> None:
    installed = {one.name.lower().replace("_", "-"): Version(one.version) for one in metadata.distributions()}
    versions = locked("development")
    assert {name: installed.get(name) for name in versions} == versions


def test_smaller_locks_have_the_same_versions() -> None:
    versions = locked("development")
    for name in ("site", "server"):
        assert locked(name).items() <= versions.items()
