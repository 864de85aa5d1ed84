"""Stands between an app that arrives from the server and this site's machine: only what was approved is executed.

Under process isolation a SuperNode starts no app itself: the site's own SuperExec starts `flwr-clientapp` by name,
which pulls the package and imports it. `guard_folder` puts a command of that name first on the path; it is this module,
which checks the package between the pull and the import. Three things are checked, since Flower finds the code by a
name and a shortened digest that the server states: the digest of the bytes, that the server states the same, and that
the code is loaded from where these bytes were unpacked, a fresh folder each time, and from nowhere else.

The module imports nothing of the project's at its top: the app brings modules of the same names, and those that are
loaded already would run instead of what was approved. It refuses such an app.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

_TASKS = ("flwr-serverapp", "flwr-agentapp", "flwr-connector", "flwr-model", "flwr-simulation")
_REFUSED_SUFFIX = ".refused.fab"
_KEPT_REFUSED = 5
_COLD = "-P -m deploy.site.app_guard"


class AppRefused(Exception):
    """The package is not one that the site approved. Its text goes to the server: digests only."""


def guard_folder(site: Path, warm: Path | None = None) -> Path:
    """Write the commands by which Flower starts apps at a site, and return their folder.

    `flwr-clientapp` checks before it runs; the commands for other kinds of tasks refuse, since a site runs none.

    Args:
        site: the site's folder.
        warm: the folder with a warm starter's socket (`deploy.site.warm.starter`), if apps are to start that way.
    """
    folder = site.resolve() / "bin"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    python = shlex.quote(sys.executable)
    client = f"-I -S {_quoted(Path(__file__).parent / 'warm' / 'client.py')} {_quoted(warm)}" if warm else _COLD
    _write_command(folder / "flwr-clientapp", f'exec {python} {client} "$@"')
    for name in _TASKS:
        _write_command(folder / name, f"echo '{name}: a site runs client apps only' >&2; exit 1")
    return folder


def approved_digests(policy: Path) -> frozenset[str]:
    """Digests that a site's policy approves; none if it can't be read."""
    try:
        listed = tomllib.loads(policy.read_text(encoding="utf-8-sig")).get("approved_app_digests", [])
    except (OSError, ValueError):
        return frozenset()
    return frozenset(str(digest).lower() for digest in listed) if isinstance(listed, list) else frozenset()


def check_package(content: bytes, stated: str, site: Path) -> str:
    """Refuse a package that the site did not approve, and keep it for a person to look at.

    Args:
        content: the package's bytes, as they came.
        stated: the digest that the server states.
        site: the site's folder, with policy.toml.

    Returns:
        The digest, SHA-256 in hexadecimal.

    Raises:
        AppRefused: it is not approved, or the server's digest is of other bytes.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest not in approved_digests(site / "policy.toml"):
        _keep(site / "apps", digest, content)
        raise AppRefused(f"app {digest} is not approved at this site; see `fedhypevae site approve`")
    if stated != digest:
        raise AppRefused(f"app {digest} was announced under another digest")
    return digest


def main() -> None:
    """`flwr-clientapp` with the check built in."""
    site = Path(os.environ["FEDHYPEVAE_SITE"])
    with tempfile.TemporaryDirectory(prefix="fedhypevae-app-") as fresh:
        os.environ["FLWR_HOME"] = fresh  # unpacked each time: nothing on the disk can be put in its place
        _install_check(site)
        from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

        flwr_clientapp()


def _install_check(site: Path) -> None:
    """Put the check between Flower's pull of a package and its unpacking.

    Raises:
        SystemExit: Flower's module is not as in the pinned release: then nothing is run.
    """
    from flwr.common.config import get_project_dir
    from flwr.supernode.runtime import run_clientapp

    pull, install = getattr(run_clientapp, "pull_task_input", None), getattr(run_clientapp, "install_from_fab", None)
    if pull is None or install is None:
        raise SystemExit("app guard: this Flower release is not the pinned one; no app is run")
    arrived: list[Any] = []

    def pull_and_note(client: Any) -> Any:
        found = pull(client)
        arrived[:] = [found]
        return found

    def check_and_install(content: bytes, **options: Any) -> Path:
        if not arrived or arrived[0][3].content != content:
            raise AppRefused("the app came by a way that this site does not check")
        _, _, run, package = arrived[0]
        check_package(content, package.hash_str, site)
        installed = Path(install(content, **options))
        if installed.resolve() != get_project_dir(run.fab_id, run.fab_version, package.hash_str).resolve():
            raise AppRefused("the app would be loaded from another place than its package was unpacked to")
        loaded = sorted({path.name.split(".")[0] for path in installed.iterdir()} & sys.modules.keys())
        if loaded:
            raise AppRefused(f"the app brings {loaded[0]}, which is loaded here already and would run in its place")
        return installed

    run_clientapp.pull_task_input = pull_and_note
    run_clientapp.install_from_fab = check_and_install


def _keep(folder: Path, digest: str, content: bytes) -> None:
    """Keep a refused package for `fedhypevae site approve`: the newest few, never unpacked."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{digest}{_REFUSED_SUFFIX}"
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
        temporary.replace(path)
    refused = sorted(folder.glob(f"*{_REFUSED_SUFFIX}"), key=_written)
    for old in refused[:-_KEPT_REFUSED]:
        old.unlink(missing_ok=True)


def _written(path: Path) -> float:
    """When a file was written; of one that another message has just removed, long ago."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _quoted(path: Path) -> str:
    return shlex.quote(str(path.resolve()))


def _write_command(path: Path, line: str) -> None:
    text = f"#!/bin/sh\n{line}\n"
    if path.is_file() and path.read_text() == text and os.access(path, os.X_OK):
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(0o700)
    temporary.replace(path)


if __name__ == "__main__":
    main()
