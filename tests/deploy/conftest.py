"""One small run, released once, for every test of bundles."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.release_cases import release, run_federation


@dataclass(frozen=True)
class Released:
    """A run's output folder, the folder with its sites, the bundle made of it, and the key that signed it."""

    run: Path
    sites: Path
    bundle: Path
    key: Path


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """To be read only."""
    home = tmp_path_factory.mktemp("federation")
    federation = run_federation(home)
    done = release(federation.output, home / "bundle", home / "key.pem", "--ledgers", home)
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    return Released(federation.output, home, home / "bundle", home / "key.pem")


@pytest.fixture
def copied(released: Released, tmp_path: Path) -> Released:
    """A copy of all of it, to be changed."""
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    shutil.copytree(released.run, run)
    shutil.copytree(released.bundle, bundle)
    for site in ("site-1", "site-2"):
        shutil.copytree(released.sites / site, tmp_path / "ledgers" / site)
    shutil.copy2(released.key, tmp_path / "key.pem")
    return Released(run, tmp_path / "ledgers", bundle, tmp_path / "key.pem")
