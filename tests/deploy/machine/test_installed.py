"""What pip installs packs the same app as the project's folder, though its settings lie elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from deploy.machine.app_package import build_package, digest_of

ROOT = Path(__file__).resolve().parents[3]
PACK = "import deploy.machine.app_package as app; print(app.INSTALLED, app.digest_of(app.build_package(app.INSTALLED)))"


def test_an_installation_packs_the_app_that_the_project_packs(tmp_path: Path) -> None:
    packages, share = tmp_path / "lib" / "python3" / "site-packages", tmp_path / "share" / "fedhypevae"
    for name in ("common", "server_app", "client_app", "embeddings", "deploy"):
        shutil.copytree(ROOT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    share.mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", share)
    project = tmp_path / "project"  # without .gitignore, which is no part of an installation
    shutil.copytree(packages, project)
    shutil.copy(ROOT / "pyproject.toml", project)
    notes = packages / "fedhypevae-0.1.0.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: fedhypevae\nVersion: 0.1.0\n")
    (notes / "RECORD").write_text("../../../share/fedhypevae/pyproject.toml,,\ncommon/__init__.py,,\n")
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(
        [sys.executable, "-c", PACK], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(packages), digest_of(build_package(project))]
