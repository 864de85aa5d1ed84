"""A site approves an app: a person sees all that is inside, then its digest takes the old one's place in the policy.

One package of each app is in force, by publisher and name. Which ones were approved before, and when, stands in
`approvals.jsonl` beside the policy: it is a record, and lets nothing run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client_app.policy.policy import load_policy
from common.durable import write_atomically
from common.errors import ConfigError, DataError
from common.plain import plain
from common.texts import read_text
from deploy.machine.app_contents import app_name, compare, listing, read_files
from deploy.machine.app_package import digest_of, find_package, with_digest
from deploy.site.folder import SiteFolder


@dataclass(frozen=True)
class Described:
    """A package and what to show of it: its files, and how it differs from the one of this app that is in force.

    `name` is the app's, `replaced` are the digests that lose their approval, `kept` those of other apps.
    """

    digest: str
    content: bytes
    lines: tuple[str, ...]
    name: str
    replaced: tuple[str, ...]
    kept: tuple[str, ...]


def describe_app(site: SiteFolder, digest: str, file: Path | None = None, *, full: bool = False) -> Described:
    """Read a package without executing any of it.

    Args:
        site: the site.
        digest: what is asked to be approved.
        file: the package; None: the one that a run brought.
        full: show the whole text, not the changes alone.

    Raises:
        ConfigError: no such package. DataError: the file has another digest, is no package, or holds what Python could
            import and a person would not see.
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
    name = app_name(files)
    others = {one: found for one, found in approved_apps(site).items() if one != digest}
    # an app whose package is not here any more may be this one: it stays approved for nobody
    replaced = tuple(one for one, found in others.items() if found in {name, None})
    kept = tuple(one for one in others if one not in replaced)
    lines = [f"app {digest}: {_shown(name)}, {len(files)} files, {len(content)} bytes", *listing(files)]
    lines += _earlier(site, digest)
    lines += [f"takes the place of {one}, which may not run any more" for one in replaced]
    lines += [f"stays approved beside it: {one}, {_shown(others[one] or '')}" for one in kept]
    before = {} if full else _last_approved(site, digest, replaced)
    if before is None:
        lines.append("no package of this app was approved here before: read all of it (--full shows it)")
    else:
        changes = compare(before, files)
        what = "all of its text" if full else "changes since the approved app" if changes else "no change"
        lines += [what, *changes]
    return Described(digest, content, tuple(lines), name, replaced, kept)


def approve_app(site: SiteFolder, package: Described) -> None:
    """Write the digest into the policy in place of this app's old one, keep the package, and note it in the record.

    Raises:
        ConfigError: the policy can't be read or changed; it is unchanged.
    """
    path = site.path / "policy.toml"
    load_policy(path)
    changed = with_digest(read_text(path), package.digest, package.kept)
    site.apps.mkdir(mode=0o700, exist_ok=True)
    write_atomically(site.apps / f"{package.digest}.fab", package.content)
    (site.apps / f"{package.digest}.refused.fab").unlink(missing_ok=True)
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "app": package.name,
        "digest": package.digest,
        "replaced": list(package.replaced),
    }
    record = site.path / "approvals.jsonl"
    past = record.read_bytes() if record.is_file() else b""
    write_atomically(record, past + json.dumps(entry).encode() + b"\n", mode=0o600)
    write_atomically(path, changed.encode())
    load_policy(path)


def approved_apps(site: SiteFolder) -> dict[str, str | None]:
    """Digests in force, in lower case, with the name of each app; None where its package is not here to tell."""
    found: dict[str, str | None] = {}
    for one in load_policy(site.path / "policy.toml").approved_app_digests:
        files = _kept_files(site, one.lower())
        found[one.lower()] = None if files is None else app_name(files)
    return found


def _kept_files(site: SiteFolder, digest: str) -> dict[str, bytes] | None:
    """Files of an approved package that was kept; None if it is not here, or is not what its name says."""
    try:
        content = (site.apps / f"{digest}.fab").read_bytes()
        return read_files(content) if digest_of(content) == digest else None
    except (OSError, DataError):
        return None


def _last_approved(site: SiteFolder, digest: str, replaced: tuple[str, ...]) -> dict[str, bytes] | None:
    """Files of the package of this app that is in force, if it is still here."""
    in_force = [one for one in approved_apps(site) if one == digest]
    for one in (*in_force, *reversed(replaced)):
        files = _kept_files(site, one)
        if files is not None:
            return files
    return None


def _earlier(site: SiteFolder, digest: str) -> list[str]:
    """A warning where the record says that this package was approved once and replaced: it is an older one."""
    try:
        lines = (site.path / "approvals.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines]
        replaced = [str(entry["time"]) for entry in entries if digest in entry["replaced"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        return ["warning: approvals.jsonl can't be read, so whether this app is an older one is not known"]
    return [f"warning: this is an OLDER app, which was replaced on {plain(time)}" for time in replaced[-1:]]


def _shown(name: str) -> str:
    return plain(name, ascii_only=True) or "an app without a name"
