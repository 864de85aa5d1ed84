"""The app as it travels: built, named by its digest, listed and compared. Nothing here executes any of it."""

from __future__ import annotations

import difflib
import hashlib
import io
import re
import shutil
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError, DataError

_LARGEST_BYTES = 50_000_000
_DIGEST = re.compile(r"[0-9a-f]{64}")
# a pattern that names a folder of the project first, with no sign of a pattern in the name
_FOLDER = re.compile(r"/?([A-Za-z0-9_-]+)/")


def app_files(app_folder: Path) -> dict[str, Path]:
    """Files that may go into a folder's app package, by path in it.

    Flower looks at every file below the folder, the virtual environment's tens of thousands too, which takes seconds.
    Where each `fab-include` pattern begins with a folder's plain name, nothing outside those folders can be packed.

    Raises:
        ConfigError: the folder holds no Flower app.
    """
    from flwr.cli.utils import collect_files

    root = app_folder.expanduser().resolve()
    try:
        content = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        patterns = content["tool"]["flwr"]["app"].get("fab-include", [""])
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"{app_folder} holds no Flower app: expected a pyproject.toml with its settings") from error
    folders = [_FOLDER.match(str(pattern)) for pattern in patterns]
    if not all(folders):
        return collect_files(root)
    files = {name: root / name for name in ("pyproject.toml", ".gitignore") if (root / name).is_file()}
    for name in sorted({found[1] for found in folders if found is not None}):
        if (root / name).is_dir() and not (root / name).is_symlink():
            files |= {f"{name}/{path}": file for path, file in collect_files(root / name).items()}
    return files


def build_package(app_folder: Path) -> bytes:
    """The app package of a project folder, byte for byte as `flwr run` would send it.

    Raises:
        ConfigError: the folder holds no Flower app.
    """
    from flwr.cli.build import build_fab_from_files

    files = app_files(app_folder)
    try:
        return bytes(build_fab_from_files(files)[0])
    except Exception as error:
        raise ConfigError(f"{app_folder} holds no app that can be packed: {error}") from error


@contextmanager
def staged_app(app_folder: Path) -> Iterator[Path]:
    """A folder with the app's own files alone, for a `flwr run` that looks at no others; gone afterwards.

    Raises:
        ConfigError: the folder holds no Flower app.
    """
    files = app_files(app_folder)
    with tempfile.TemporaryDirectory(prefix="fedhypevae-app-") as home:
        folder = Path(home) / "app"
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        yield folder


def digest_of(content: bytes) -> str:
    """SHA-256 of a package, hexadecimal: what a site approves."""
    return hashlib.sha256(content).hexdigest()


def read_files(package: bytes) -> dict[str, bytes]:
    """Contents of a package by path; read in memory, never unpacked.

    Raises:
        DataError: it is no zip file, or unpacks to more than 50 MB.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(package)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _LARGEST_BYTES:
                raise DataError("the package unpacks to more than 50 MB: not an app of this project")
            return {name: archive.read(name) for name in sorted(archive.namelist()) if not name.endswith("/")}
    except zipfile.BadZipFile:
        raise DataError("the package is no zip file") from None


def compare(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Lines that tell what a package changes: files that are new, gone or different, with a unified diff of text."""
    lines: list[str] = []
    for name in sorted(set(before) | set(after)):
        if name.startswith(".info/") or before.get(name) == after.get(name):
            continue
        lines.extend(
            difflib.unified_diff(
                _text(before.get(name)), _text(after.get(name)), f"approved/{name}", f"new/{name}", lineterm="", n=2
            )
        )
    return lines


def find_package(apps: Path, digest: str) -> Path:
    """The package of a digest among those that arrived at a site.

    Raises:
        ConfigError: it is no digest, or no such package came; DataError: the file is not what its name says.
    """
    digest = digest.lower()
    if _DIGEST.fullmatch(digest) is None:
        raise ConfigError(f"a digest has 64 hexadecimal digits, found {digest!r}")
    for path in (apps / f"{digest}.fab", apps / f"{digest}.refused.fab"):
        if path.is_file():
            if digest_of(path.read_bytes()) != digest:
                raise DataError(f"{path} is not what its name says: delete it")
            return path
    raise ConfigError(
        f"no app {digest} is at this site: give its file with --file, or let the coordinator try a run, which brings it"
    )


def with_digest(policy: str, digest: str) -> str:
    """The text of a policy file with one more approved digest; every other line and comment stays.

    Raises:
        ConfigError: `approved_app_digests` stands there in a form that a program can't extend.
    """
    line = re.compile(r"^approved_app_digests\s*=\s*\[([^\]]*)\]", re.MULTILINE)
    found = line.search(policy)
    if found is None:
        if re.search(r"^\s*approved_app_digests", policy, re.MULTILINE):
            raise ConfigError(f'add "{digest}" to approved_app_digests in the policy by hand')
        return policy.rstrip("\n") + f'\napproved_app_digests = ["{digest}"]\n'
    listed = re.findall(r'"([0-9a-fA-F]+)"', found.group(1))
    if digest in (one.lower() for one in listed):
        return policy
    inside = ", ".join(f'"{one}"' for one in [*listed, digest])
    return policy[: found.start()] + f"approved_app_digests = [{inside}]" + policy[found.end() :]


def _text(content: bytes | None) -> list[str]:
    if content is None:
        return []
    try:
        return content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        return [f"(binary, SHA-256 {hashlib.sha256(content).hexdigest()})"]
