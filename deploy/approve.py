"""A site approves an app: a person sees what is inside, then its digest enters the site's policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client_app.site import load_policy
from common.durable import write_atomically
from common.errors import ConfigError, DataError
from deploy.app_package import compare, digest_of, find_package, read_files, with_digest
from deploy.folders import SiteFolder


@dataclass(frozen=True)
class Described:
    """A package and what to show of it: its files, and how it differs from the last approved one."""

    digest: str
    content: bytes
    lines: tuple[str, ...]


def describe_app(site: SiteFolder, digest: str, file: Path | None = None) -> Described:
    """Read a package without executing any of it.

    Args:
        site: the site.
        digest: what is asked to be approved.
        file: the package; None: the one that a run brought.

    Raises:
        ConfigError: no such package. DataError: the file has another digest, or is no package.
    """
    digest = digest.lower()
    path = file if file is not None else find_package(site.apps, digest)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"no package at {path} ({error.strerror})") from None
    if digest_of(content) != digest:
        raise DataError(f"{path} has digest {digest_of(content)}, not {digest}: it is another package; approve nothing")
    files = read_files(content)
    lines = [f"app {digest}: {len(files)} files, {len(content)} bytes"]
    lines += [f"  {len(body):>8} {name}" for name, body in files.items() if not name.startswith(".info/")]
    before = _last_approved(site)
    if before is None:
        lines.append("nothing was approved here before: read all of it (it is a zip file)")
    else:
        changes = compare(read_files(before), files)
        lines.append("changes since the last approved app:" if changes else "no change since the last approved app")
        lines += changes
    return Described(digest, content, tuple(lines))


def approve_app(site: SiteFolder, package: Described) -> None:
    """Write the digest into the policy, and keep the package to compare the next with.

    Raises:
        ConfigError: the policy can't be read or extended; it is unchanged.
    """
    path = site.path / "policy.toml"
    load_policy(path)
    changed = with_digest(path.read_text(encoding="utf-8"), package.digest)
    site.apps.mkdir(mode=0o700, exist_ok=True)
    write_atomically(site.apps / f"{package.digest}.fab", package.content)
    (site.apps / f"{package.digest}.refused.fab").unlink(missing_ok=True)
    write_atomically(path, changed.encode())
    load_policy(path)


def _last_approved(site: SiteFolder) -> bytes | None:
    """The package approved last, if it is still here."""
    approved = load_policy(site.path / "policy.toml").approved_app_digests
    for digest in reversed(approved):
        path = site.apps / f"{digest.lower()}.fab"
        if path.is_file():
            return path.read_bytes()
    return None
