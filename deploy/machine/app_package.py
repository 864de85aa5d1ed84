"""The app as it travels: built, named by its digest, found and written into a policy. Nothing here executes it."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from common.errors import ConfigError, DataError

INSTALLED = Path(__file__).resolve().parents[2]
"""The folder of this program's own code: the project's, or where packages are installed."""
_SETTINGS = "pyproject.toml"
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
    settings = _installed_settings() if root == INSTALLED and not (root / _SETTINGS).is_file() else root / _SETTINGS
    try:
        content = tomllib.loads(settings.read_text(encoding="utf-8"))
        patterns = content["tool"]["flwr"]["app"].get("fab-include", [""])
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"{app_folder} holds no Flower app: expected a pyproject.toml with its settings") from error
    folders = [_FOLDER.match(str(pattern)) for pattern in patterns]
    if not all(folders):
        return collect_files(root)
    files = {_SETTINGS: settings, **({".gitignore": path} if (path := root / ".gitignore").is_file() else {})}
    for name in sorted({found[1] for found in folders if found is not None}):
        if (root / name).is_dir() and not (root / name).is_symlink():
            files |= {f"{name}/{path}": file for path, file in collect_files(root / name).items()}
    return files


def _installed_settings() -> Path:
    """Where pip put the project's settings: beside the installed code lie other packages, and no such file."""
    found = [file for file in metadata.files("fedhypevae") or () if file.parts[-2:] == ("fedhypevae", _SETTINGS)]
    return Path(str(found[0].locate())).resolve() if found else INSTALLED / _SETTINGS


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


def with_digest(policy: str, digest: str, others: Sequence[str] = ()) -> str:
    """The text of a policy file in which an app takes the place of those before; every other line and comment stays.

    Args:
        policy: the text.
        digest: the app that is approved.
        others: digests that stay approved beside it, those of other apps.

    Raises:
        ConfigError: `approved_app_digests` stands there in a form that a program can't change.
    """
    wanted = [*(one for one in others if one != digest), digest]
    line = "approved_app_digests = [" + ", ".join(f'"{one}"' for one in wanted) + "]"
    found = re.search(r"^approved_app_digests\s*=\s*\[[^\]]*\]", policy, re.MULTILINE)
    if found is None:
        changed = policy.rstrip("\n") + f"\n{line}\n"
    else:
        changed = policy[: found.start()] + line + policy[found.end() :]
    try:
        fine = tomllib.loads(changed)["approved_app_digests"] == wanted
    except (KeyError, ValueError):
        fine = False
    if not fine:
        raise ConfigError(f"write this line into the policy by hand, in place of the one that is there: {line}")
    return changed
