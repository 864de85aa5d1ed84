"""What commands and runs write is its owner's alone, whatever the umask; what is to be published can be read by all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.durable import create_private, keep_private, make_private, write_atomically
from embeddings.store.parts import Parts
from tests.deploy.release_cases import release
from tests.harness import Federation

ROOT = Path(__file__).resolve().parents[2]


def open_to_others(folder: Path) -> dict[str, str]:
    """Files and folders that others may read, write or enter, with their permissions."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        mode = path.stat().st_mode & 0o777
        if mode & 0o077 and path.suffix != ".pub":
            found[path.relative_to(folder).as_posix()] = oct(mode)
    return found


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_commands_of_a_site_and_a_coordinator_leave_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text('name = "study"\nserver_names = ["fl.example.org"]\nsites = ["st-anna"]\n')
    (tmp_path / "ready").mkdir()
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    np.savez(tmp_path / "ready" / "r.npz", embeddings=rng.standard_normal((40, 4)).astype(np.float32), labels=labels)
    out = tmp_path / "out"
    site = out / "sites" / "st-anna"
    encoder = ("--encoder", "e", "--revision", "1", "--preprocessing", "none", "--salt", site / "salt")
    program = "import os, sys\nos.umask(0)\nfrom deploy.cli import main\nmain()\n"
    steps: list[tuple[object, ...]] = [
        ("provision", tmp_path / "study.toml", "--out", out),
        ("site", "init", site, "--cohort", "st-anna/breast", "--unit", "record"),
        (
            "data",
            "import",
            tmp_path / "ready" / "r.npz",
            "--out",
            site / "site.parquet",
            *encoder,
            "--salt",
            site / "salt",
        ),
        ("data", "check", site / "site.parquet"),
        ("data", "partition", site / "site.parquet", "--by", "iid", "--sites", "2", "--out", site / "parts"),
        ("server", "package", ROOT, "--out", tmp_path / "app.fab"),
        ("ledger", "export", site / "ledger.db", site / "ledger.json"),
        ("ledger", "backup", site / "ledger.db", site / "copy.db"),
        ("site", "renew-key", site),
        ("status", out / "server"),
    ]
    for step in steps:
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, step)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0 or step[0] == "status", (step, done.stderr)
    digest = subprocess.run(["sha256sum", tmp_path / "app.fab"], capture_output=True, text=True, check=True).stdout[:64]
    approve = ("site", "approve", str(site), digest, "--file", str(tmp_path / "app.fab"), "--yes")
    subprocess.run([sys.executable, "-c", program, *approve], capture_output=True, check=True, cwd=tmp_path)
    assert (site / "approvals.jsonl").is_file()
    assert open_to_others(site) == {}
    assert open_to_others(site.with_name("st-anna-witness")) == {}
    assert out.stat().st_mode & 0o077 == 0


def test_run_leaves_nothing_open_at_sites_or_server(tmp_path: Path, no_umask: None) -> None:
    federation = Federation.create(tmp_path / "federation", 2)
    federation.run(num_rounds=1)
    written = {path.name for path in federation.output.rglob("*") if path.is_file()}
    assert {"summary.json", "synthetic.parquet", "generator.safetensors"} <= written
    assert open_to_others(federation.output) == {}
    for name in ("site-1", "site-2"):
        folder = federation.site(name).folder
        assert {"ledger.db", "releases.jsonl", "site.parquet"} <= {path.name for path in folder.iterdir()}
        fixture = {".", "policy.toml"}  # made by the test's own harness
        assert {path: mode for path, mode in open_to_others(folder).items() if path not in fixture} == {}


def test_bundle_is_for_everybody(tmp_path: Path, no_umask: None) -> None:
    federation = Federation.create(tmp_path / "federation", 2)
    federation.run(num_rounds=1)
    os.umask(0o077)
    done = release(federation.output, tmp_path / "bundle", tmp_path / "key")
    assert (tmp_path / "bundle" / "SHA256SUMS").is_file(), done.output
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "bundle").iterdir()} == {0o644}
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_helpers_close_what_they_make(tmp_path: Path, no_umask: None) -> None:
    make_private(tmp_path / "a" / "b" / "c")
    write_atomically(tmp_path / "a" / "d" / "file", b"x")
    with create_private(tmp_path / "a" / "late") as file:
        file.write(b"x")
    Parts(tmp_path / "a" / "parts", "encoder").save(np.zeros((2, 3), np.float32), np.zeros((2, 16), np.uint8))
    assert open_to_others(tmp_path / "a") == {}


def test_keep_private_closes_what_was_open(tmp_path: Path) -> None:
    for name in ("a", "run.sh", "b.pub"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "link").symlink_to("/etc/hostname")
    assert keep_private(tmp_path) == ()
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "run.sh", "b.pub")] == [0o700, 0o700, 0o755]


def test_programs_that_a_command_starts_write_for_their_owner_alone() -> None:
    """SuperLink, SuperNode and the app write files of their own: they inherit the command's umask."""
    program = "import os, sys\nos.umask(0)\nfrom deploy.cli import main\nsys.argv = ['fedhypevae', '--help']\n"
    program += "try:\n    main()\nexcept SystemExit:\n    print(oct(os.umask(0)))\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0o77"
