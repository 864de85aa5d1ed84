"""What stands between an app and a site: digests, approvals, and the commands that start apps."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from client_app.policy.policy import load_policy
from client_app.policy.template import policy_template
from common.errors import ConfigError, DataError
from deploy.machine.app_contents import compare, read_files
from deploy.machine.app_package import find_package, with_digest
from deploy.site import app_guard
from deploy.site.app_guard import AppRefused, check_package, guard_folder
from deploy.site.approve import approve_app, describe_app
from deploy.site.folder import SiteFolder

ROOT = Path(app_guard.__file__).parents[2]


def package(**files: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/") + ".py", text)
    return sink.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    (tmp_path / "policy.toml").write_text(policy_template("trial"))
    return SiteFolder(tmp_path)


def test_check_package_refuses_what_nobody_approved_and_keeps_it(site: SiteFolder) -> None:
    content = package(client_app__app="x = 1\n")
    with pytest.raises(AppRefused, match=digest(content)):
        check_package(content, digest(content), site.path)
    assert find_package(site.apps, digest(content)).read_bytes() == content


def test_check_package_lets_an_approved_one_pass_and_no_other_byte(site: SiteFolder) -> None:
    content = package(client_app__app="x = 1\n")
    with pytest.raises(AppRefused):
        check_package(content, digest(content), site.path)
    approve_app(site, describe_app(site, digest(content)))
    assert check_package(content, digest(content), site.path) == digest(content)
    with pytest.raises(AppRefused):
        check_package(content + b"\0", digest(content), site.path)
    with pytest.raises(AppRefused, match="announced under another digest"):
        check_package(content, "0" * 64, site.path)


@pytest.mark.parametrize("broken", ["", "approved_app_digests = 'all'", "not toml ["])
def test_check_package_refuses_where_the_policy_says_nothing(site: SiteFolder, broken: str) -> None:
    (site.path / "policy.toml").write_text(broken)
    content = package(a="")
    with pytest.raises(AppRefused):
        check_package(content, digest(content), site.path)
    (site.path / "policy.toml").unlink()
    with pytest.raises(AppRefused):
        check_package(content, digest(content), site.path)


def test_refused_packages_do_not_fill_the_disk(site: SiteFolder) -> None:
    for number in range(12):
        content = package(a=f"x = {number}\n")
        with pytest.raises(AppRefused):
            check_package(content, digest(content), site.path)
    assert len(list(site.apps.iterdir())) == 5


def test_describe_app_shows_the_changed_line(site: SiteFolder) -> None:
    before, after = package(client_app__app="x = 1\ny = 2\n"), package(client_app__app="x = 1\ny = open('data')\n")
    for content in (before, after):
        with pytest.raises(AppRefused):
            check_package(content, digest(content), site.path)
    approve_app(site, describe_app(site, digest(before)))
    lines = describe_app(site, digest(after)).lines
    assert "+y = open('data')" in lines
    assert "-y = 2" in lines


def test_approve_app_refuses_a_file_of_another_digest(site: SiteFolder, tmp_path: Path) -> None:
    (tmp_path / "app.fab").write_bytes(package(a="x = 1\n"))
    with pytest.raises(DataError, match="another package"):
        describe_app(site, "0" * 64, tmp_path / "app.fab")
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        describe_app(site, "../../etc/passwd")


def test_with_digest_keeps_comments_and_other_lines() -> None:
    text = policy_template("trial", approved_app_digests=("a" * 64, "c" * 64))
    changed = with_digest(text, "b" * 64, ("c" * 64,))
    assert [line for line in changed.splitlines() if line not in text.splitlines()] == [
        f'approved_app_digests = ["{"c" * 64}", "{"b" * 64}"]'
    ]
    assert [line for line in text.splitlines() if line not in changed.splitlines()] == [
        f'approved_app_digests = ["{"a" * 64}", "{"c" * 64}"]'
    ]
    assert with_digest(changed, "b" * 64, ("c" * 64,)) == changed


def test_approve_app_leaves_a_readable_policy_of_its_owner(site: SiteFolder) -> None:
    path = site.path / "policy.toml"
    path.chmod(0o600)
    content = package(a="x = 1\n")
    (site.path / "app.fab").write_bytes(content)
    approve_app(site, describe_app(site, digest(content), site.path / "app.fab"))
    assert load_policy(path).approved_app_digests == (digest(content),)
    assert path.stat().st_mode & 0o022 == 0


def test_compare_tells_new_and_lost_files() -> None:
    lines = compare({"a.py": b"x = 1\n", "gone.py": b"y\n"}, {"a.py": b"x = 1\n", "new.py": b"z\n"})
    assert "+++ new/new.py" in lines
    assert "--- approved/gone.py" in lines
    assert not [line for line in lines if "a.py" in line]


def test_read_files_refuses_a_bomb_and_no_zip() -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * 60_000_000)
    with pytest.raises(DataError, match="50 MB"):
        read_files(sink.getvalue())
    with pytest.raises(DataError, match="no zip"):
        read_files(b"hello")


def test_guard_folder_refuses_every_other_kind_of_task(tmp_path: Path) -> None:
    folder = guard_folder(tmp_path)
    for name in ("flwr-serverapp", "flwr-agentapp", "flwr-simulation"):
        assert subprocess.run([folder / name], capture_output=True, check=False).returncode == 1
    assert "deploy.site.app_guard" in (folder / "flwr-clientapp").read_text()
    assert os.access(folder / "flwr-clientapp", os.X_OK)


def test_app_guard_loads_no_module_that_an_app_brings() -> None:
    code = "import sys, deploy.site.app_guard, deploy.site.warm.starter; "
    code += "print([m for m in sys.modules if m.split('.')[0] in ('common', 'client_app', 'embeddings', 'server_app')])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(app_guard.__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("brought", ["client_app", "numpy"])
def test_app_that_brings_a_loaded_module_is_refused(
    site: SiteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brought: str
) -> None:
    """What is loaded already would run in place of the app's own; an app of other names is installed."""
    from flwr.common.config import get_project_dir
    from flwr.supernode.runtime import run_clientapp

    content = package(**{f"{brought}__app": "x = 1\n"})
    (site.path / "policy.toml").write_text(policy_template("trial", approved_app_digests=(digest(content),)))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    folder = get_project_dir("a/b", "1.0", digest(content))

    def install(content: bytes) -> Path:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(folder)
        return folder

    arrived = (None, None, SimpleNamespace(fab_id="a/b", fab_version="1.0"),
               SimpleNamespace(content=content, hash_str=digest(content)))  # fmt: skip
    monkeypatch.setattr(run_clientapp, "pull_task_input", lambda _: arrived)
    monkeypatch.setattr(run_clientapp, "install_from_fab", install)
    monkeypatch.setattr(sys, "modules", {name: sys.modules[name] for name in sys.modules if name != "client_app"})
    app_guard._install_check(site.path)
    run_clientapp.pull_task_input(None)
    if brought == "client_app":
        assert run_clientapp.install_from_fab(content) == folder
    else:
        with pytest.raises(AppRefused, match="numpy, which is loaded here already"):
            run_clientapp.install_from_fab(content)
