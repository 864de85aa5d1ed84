"""What is inside an app's package, and what has changed: all of it, as a person can see it. Nothing is executed.

A package is approved by what is shown of it. So it is refused where Python could read something else than is shown:
an archive that another program may unpack otherwise, code that is no text, text in another encoding.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import re
import stat
import sys
import tokenize
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from importlib.machinery import all_suffixes
from importlib.metadata import packages_distributions

from common.errors import DataError
from common.plain import plain

MANIFEST = ".info/CONTENT"
_LARGEST_BYTES = 50_000_000
_MOST_FILES = 10_000
_WIDTH = 160  # columns of a shown line; what is longer goes on below
_PART = re.compile(r"[A-Za-z0-9_.-]+")
_SOURCE = (".py", ".pyw", ".pyi")
_IMPORTABLE = (".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib", ".pth", ".egg", ".whl", ".zip", ".pyz", ".pyzw")
_MACHINE_CODE = (b"\x7fELF", b"MZ", b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe",
                 b"\xca\xfe\xba\xbe")  # fmt: skip
_RUN_AT_START = {"sitecustomize", "usercustomize"}


def read_files(package: bytes) -> dict[str, bytes]:
    """Contents of a package by path; read in memory, never unpacked.

    Raises:
        DataError: it is no zip file, unpacks to more than 50 MB, is not as Flower packs an app, or holds what Python
            could import and a person would not see.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(package)) as archive:
            entries = archive.infolist()
            _check_size(entries)
            problem = next(_odd_entries(entries), None)
            files = {} if problem else {entry.filename: archive.read(entry) for entry in entries}
    except DataError:
        raise
    except Exception as error:  # a crafted archive may raise anything
        raise DataError(f"the package is no zip file that can be read ({type(error).__name__})") from None
    if problem is None and _packed(entries, files) != package:
        problem = (
            "it is not as Flower packs an app (hidden parts, comments, compression): programs may read it in two ways"
        )
    problem = problem or next((found for name, body in files.items() if (found := _unseen(name, body))), None)
    if problem is None and MANIFEST in files and files[MANIFEST] != _manifest(files):
        problem = f"{MANIFEST} is not the list of its files"
    if problem:
        raise DataError(f"the package is refused: {problem}; approve nothing, and ask the coordinator for another")
    return dict(sorted(files.items()))


def app_name(files: Mapping[str, bytes]) -> str:
    """Publisher and name of an app, as `publisher/name`; empty where its settings don't say (Flower runs none such)."""
    try:
        settings = tomllib.loads(files["pyproject.toml"].decode("utf-8"))
        return f"{settings['tool']['flwr']['app']['publisher']}/{settings['project']['name']}"
    except (KeyError, ValueError, TypeError, RecursionError):
        return ""


def listing(files: Mapping[str, bytes]) -> list[str]:
    """One line for each file: size, name, the digest of one that is no text, and a word on names that are Python's."""
    lines, libraries = [], packages_distributions()
    for name, body in sorted(files.items()):
        note = "" if _text(body) is not None else f"  {_binary(body)}"
        if _top_module(name) in sys.stdlib_module_names:
            note += f"  (takes the place of Python's own {_top_module(name)})"
        elif set(libraries.get(_top_module(name), ())) - {"fedhypevae"}:  # the app's own modules are installed as well
            note += f"  (takes the place of the library {_top_module(name)})"
        lines.append(f"  {len(body):>8} {plain(name, ascii_only=True)}{note}")
    return lines


def compare(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[str]:
    """Lines that tell what a package changes: files that are new, gone or different, with a unified diff of text.

    Every character that a terminal obeys, hides or reorders, and every one beyond ASCII, is written as an escape. A
    long line is cut and goes on below. Lines end where Python ends them.
    """
    lines: list[str] = []
    for name in sorted((set(before) | set(after)) - {MANIFEST}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        what = "new" if old is None else "gone" if new is None else "changed"
        lines.append(f"== {plain(name, ascii_only=True)}: {what}")
        found = difflib.unified_diff(_lines(old), _lines(new), f"approved/{name}", f"new/{name}", lineterm="", n=2)
        shown = [part for line in found for part in _cut(plain(line, ascii_only=True))]
        lines += shown or ["(empty, or another end of its last line alone)"]
    return lines


def _check_size(entries: list[zipfile.ZipInfo]) -> None:
    if sum(entry.file_size for entry in entries) > _LARGEST_BYTES or len(entries) > _MOST_FILES:
        raise DataError(f"the package unpacks to more than 50 MB, or {_MOST_FILES:,} files: not an app of this project")


def _odd_entries(entries: list[zipfile.ZipInfo]) -> Iterator[str]:
    """What forbids to read the archive, by its directory alone."""
    seen: set[str] = set()
    for entry in entries:
        name = plain(entry.filename, ascii_only=True)
        parts = entry.filename.split("/")
        if len(name) > 200 or any(_PART.fullmatch(part) is None or part in {".", ".."} for part in parts):
            yield f"{name[:100]} is no plain path of a file (letters, digits, _ . - and / of ASCII, no .. in it)"
        if stat.S_IFMT(entry.external_attr >> 16) not in {0, stat.S_IFREG}:
            yield f"{name} is a link or another thing that is no file"
        if entry.filename.casefold() in seen:
            yield f"{name} is there twice, or a second time in other letters"
        seen.add(entry.filename.casefold())


def _packed(entries: list[zipfile.ZipInfo], files: Mapping[str, bytes]) -> bytes:
    """The files as Python's zipfile writes them: one entry after the other, and nothing beside."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for entry in entries:
            same = zipfile.ZipInfo(entry.filename, entry.date_time)
            same.create_system, same.external_attr = entry.create_system, entry.external_attr
            archive.writestr(same, files[entry.filename])
    return sink.getvalue()


def _manifest(files: Mapping[str, bytes]) -> bytes:
    """Flower's list: path, SHA-256 and size in bits of every other file, in the order of the package."""
    others = ((name, body) for name, body in files.items() if name != MANIFEST)
    return "\n".join(f"{name},{hashlib.sha256(body).hexdigest()},{len(body) * 8}" for name, body in others).encode()


def _unseen(name: str, body: bytes) -> str | None:
    """Why a file could run without having been seen; None if it could not."""
    lower, text = name.lower(), _text(body)
    if "__pycache__" in lower.split("/") or lower.endswith((*_IMPORTABLE, *_compiled())) or ".so." in lower:
        return f"{name} is something that Python imports and nobody can read"
    if text is None and (body.startswith(_MACHINE_CODE) or body[2:4] == b"\r\n"):
        return f"{name} holds compiled code"
    if zipfile.is_zipfile(io.BytesIO(body)):
        return f"{name} holds an archive, from which Python imports"
    if lower.endswith(_SOURCE) and text is None:
        return f"{name} is code, and no text in UTF-8"
    if text is not None and not _is_read_as_utf8(text):
        return f"{name} names another encoding than UTF-8, by which Python reads something else than is shown"
    if _top_module(lower) in _RUN_AT_START:
        return f"{name} is what Python runs before any program"
    return None


def _top_module(name: str) -> str:
    """The module that Python finds by a file's name, from the package's top; empty if there is none."""
    top, _, below = name.partition("/")
    return top if below else top.split(".", 1)[0] if name.endswith(_SOURCE) else ""


def _compiled() -> tuple[str, ...]:
    return tuple(suffix for suffix in all_suffixes() if suffix not in _SOURCE)


def _is_read_as_utf8(text: str) -> bool:
    """Whether Python reads the text as UTF-8, by the mark that one of its first two lines may have."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO("\n".join(_split(text)).encode()).readline)
    except SyntaxError:
        return False
    return encoding in {"utf-8", "utf-8-sig"}


def _text(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _lines(content: bytes | None) -> list[str]:
    if content is None:
        return []
    text = _text(content)
    return [_binary(content)] if text is None else _split(text)


def _split(text: str) -> list[str]:
    """Lines as Python divides them, at carriage returns too, which stay visible; not at other separators."""
    return [line.removesuffix("\n") for line in re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)]


def _binary(content: bytes) -> str:
    return f"(binary, {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()})"


def _cut(line: str) -> Iterator[str]:
    """A line in pieces of a screen's width; those that go on have the sign of the first and a mark."""
    yield line[:_WIDTH]
    for start in range(_WIDTH, len(line), _WIDTH):
        yield f"{line[0]} ...{line[start : start + _WIDTH]}"
