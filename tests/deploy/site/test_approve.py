"""What a person is shown of an app, what is refused since it can't be shown, and what an approval takes back."""

from __future__ import annotations

import hashlib
import io
import json
import marshal
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from client_app.policy.policy import load_policy
from client_app.policy.template import policy_template
from common.errors import ConfigError, DataError
from common.plain import plain
from deploy.cli import app as commands
from deploy.machine.app_contents import app_name, compare, read_files
from deploy.machine.app_package import build_package, with_digest
from deploy.site.app_guard import AppRefused, check_package
from deploy.site.approve import approve_app, describe_app
from deploy.site.folder import SiteFolder
from tests.deploy.site.test_app_guard import ROOT, digest

SETTINGS = '[project]\nname = "{}"\nversion = "1"\n[tool.flwr.app]\npublisher = "us"\n'
GOOD = "def std(sigma, clip):\n    # noise\n    return sigma * clip\n"


def package(files: dict[str, str | bytes], name: str = "fed", *, listed: bool = True) -> bytes:
    """A package as Flower writes it, its list of files included if wanted."""
    bodies = {key: body.encode() if isinstance(body, str) else body for key, body in files.items()}
    bodies = {"pyproject.toml": SETTINGS.format(name).encode(), **bodies}
    rows = [f"{key},{hashlib.sha256(body).hexdigest()},{len(body) * 8}" for key, body in bodies.items()]
    if listed:
        bodies.setdefault(".info/CONTENT", "\n".join(rows).encode())
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for key, body in bodies.items():
            archive.writestr(zipfile.ZipInfo(key, (1980, 1, 1, 0, 0, 0)), body)
    return sink.getvalue()


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    (tmp_path / "policy.toml").write_text(policy_template("trial"))
    return SiteFolder(tmp_path)


def approve(site: SiteFolder, content: bytes) -> tuple[str, ...]:
    file = site.path / "app.fab"
    file.write_bytes(content)
    described = describe_app(site, digest(content), file)
    approve_app(site, described)
    return described.lines


def runs(site: SiteFolder, content: bytes) -> bool:
    try:
        return check_package(content, digest(content), site.path) == digest(content)
    except AppRefused:
        return False


def test_approval_takes_the_place_of_the_old_one(site: SiteFolder) -> None:
    old, new = package({"a.py": "hole = 1\n"}), package({"a.py": "hole = 0\n"})
    approve(site, old)
    assert runs(site, old)
    lines = approve(site, new)
    assert f"takes the place of {digest(old)}, which may not run any more" in lines
    assert (runs(site, old), runs(site, new)) == (False, True)
    record = [json.loads(line) for line in (site.path / "approvals.jsonl").read_text().splitlines()]
    assert [(entry["app"], entry["digest"], entry["replaced"]) for entry in record] == [
        ("us/fed", digest(old), []),
        ("us/fed", digest(new), [digest(old)]),
    ]
    assert (site.path / "approvals.jsonl").stat().st_mode & 0o077 == 0


def test_older_app_is_shown_as_older(site: SiteFolder) -> None:
    old, new = package({"a.py": "hole = 1\n"}), package({"a.py": "hole = 0\n"})
    assert not [line for line in approve(site, old) if "OLDER" in line]
    approve(site, new)
    assert [line for line in approve(site, old) if line.startswith("warning: this is an OLDER app")]
    assert (runs(site, old), runs(site, new)) == (True, False)


def test_apps_of_other_names_stay_and_unknown_ones_do_not(site: SiteFolder) -> None:
    other, first, second = package({}, "other"), package({"a.py": "x = 1\n"}), package({"a.py": "x = 2\n"})
    unknown = "ab" * 32
    (site.path / "policy.toml").write_text(policy_template("trial", approved_app_digests=(unknown,)))
    approve(site, other)
    assert load_policy(site.path / "policy.toml").approved_app_digests == (digest(other),)
    approve(site, first)
    lines = approve(site, second)
    assert f"stays approved beside it: {digest(other)}, us/other" in lines
    assert (runs(site, other), runs(site, first), runs(site, second)) == (True, False, True)


def test_approval_of_capital_digits_is_replaced_as_well(site: SiteFolder) -> None:
    old, new = package({"a.py": "x = 1\n"}), package({"a.py": "x = 2\n"})
    approve(site, old)
    path = site.path / "policy.toml"
    path.write_text(path.read_text().replace(digest(old), digest(old).upper()))
    approve(site, new)
    assert (runs(site, old), runs(site, new)) == (False, True)


@pytest.mark.parametrize(
    "form",
    [
        'approved_app_digests = [\n  "{0}",  # "{1}"\n]\n',
        "approved_app_digests = ['{0}']\n",
        'approved_app_digests=["{0}"]\n',
    ],
)
def test_with_digest_replaces_however_the_list_is_written(form: str) -> None:
    text = 'cohort_id = "x"\n' + form.format("a" * 64, "c" * 64) + "# a last word\n"
    changed = with_digest(text, "b" * 64)
    assert changed == f'cohort_id = "x"\napproved_app_digests = ["{"b" * 64}"]\n# a last word\n'


@pytest.mark.parametrize(
    "text", ['"approved_app_digests" = ["{}"]\n', ' approved_app_digests = ["{}"]\n', "[other]\nx = 1\n", "no toml"]
)
def test_with_digest_says_what_it_cannot_change(text: str) -> None:
    with pytest.raises(ConfigError, match="by hand"):
        with_digest(text.format("a" * 64), "b" * 64)


HIDERS = ["\x1b[1G\x1b[2K", "\x08" * 20, "\x9b2K", "\u202e", "\u2066", "\u200b", "\u2028", "\u3164", "\ufe0f", "\u0430"]


@pytest.mark.parametrize("hider", HIDERS)
def test_shown_lines_have_nothing_that_a_terminal_obeys_or_hides(site: SiteFolder, hider: str) -> None:
    evil = f"def std(sigma, clip):\n    # noise\n    return 0 * sigma  #{hider}+    # noise of sigma times clip\n"
    approve(site, package({"common/noise.py": GOOD}))
    lines = approve(site, package({"common/noise.py": evil}))
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("+    return 0 * sigma  #\\")]


def test_carriage_return_ends_a_line_as_it_does_for_python() -> None:
    evil = "# a comment\rimport os\r\nx = 1\n"
    compile(evil, "x", "exec")
    lines = compare({"a.py": b""}, {"a.py": evil.encode()})
    assert lines[-3:] == ["+# a comment\\r", "+import os\\r", "+x = 1"]


@given(st.text())
def test_plain_leaves_one_line_that_is_seen(text: str) -> None:
    for shown in (plain(text), plain(text, ascii_only=True)):
        assert shown.isprintable()
    assert plain(text, ascii_only=True).isascii()


def test_plain_keeps_names_of_people_s_languages() -> None:
    assert plain("Säugling 肝 ε") == "Säugling 肝 ε"
    assert plain("a\u3164b\ufe0f") == "a\\u3164b\\ufe0f"
    assert plain("a\u202eb\u200bc\ud800\t") == "a\\u202eb\\u200bc\\ud800\\t"


def test_long_line_is_shown_to_its_end() -> None:
    lines = compare({"a.py": b""}, {"a.py": b"x = 1" + b" " * 500 + b"; import os\n"})
    assert max(map(len, lines)) < 200
    assert any("; import os" in line for line in lines)


def test_every_file_is_listed_and_every_change_shown(site: SiteFolder) -> None:
    approve(site, package({"a.py": "x = 1\n"}))
    raw = bytes(range(256))
    more = {".info/payload.py": "hidden = 1\n", ".dot/x.md": "dot\n", "late.txt": "é".encode("latin-1"), "i.png": raw}
    lines = approve(site, package({"a.py": "x = 1\n", **more}))
    for name in more:
        assert [line for line in lines[:12] if line.split("  (")[0].endswith(f" {name}")], name
        assert f"== {name}: new" in lines
    assert "+hidden = 1" in lines
    assert f"+(binary, 256 bytes, SHA-256 {hashlib.sha256(raw).hexdigest()})" in lines


def test_change_of_a_last_line_s_end_alone_is_named() -> None:
    assert compare({"a.py": b"x = 1"}, {"a.py": b"x = 1\n"})[0] == "== a.py: changed"


def test_full_shows_all_text_and_a_first_app_asks_for_it(site: SiteFolder) -> None:
    content = package({"a.py": "x = 1\n"})
    (site.path / "app.fab").write_bytes(content)
    assert [line for line in describe_app(site, digest(content), site.path / "app.fab").lines if "--full" in line]
    assert "+x = 1" in describe_app(site, digest(content), site.path / "app.fab", full=True).lines


def pyc() -> bytes:
    return b"\xa7\r\r\n" + bytes(12) + marshal.dumps(compile("x = 1", "x", "exec"))


def zipped(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, "x = 1\n")
    return sink.getvalue()


UNSEEN: dict[str, tuple[str, bytes]] = {
    "so": ("common/fast.cpython-311-x86_64-linux-gnu.so", b"text"),
    "versioned so": ("common/lib.so.6", b"text"),
    "pyd": ("common/fast.PYD", b"text"),
    "pth": ("late.pth", b"import os\n"),
    "pyc": ("common/late.pyc", pyc()),
    "cache": ("common/__pycache__/x.txt", b"x"),
    "pyc under another name": ("common/data.bin", pyc()),
    "machine code under another name": ("common/data.bin", b"\x7fELF\xff\xff"),
    "zip": ("common/x.zip", b"no"),
    "egg": ("common/x.egg", b"no"),
    "zip under another name": ("common/data.bin", b"\xff junk before " + zipped("evil.py")),
    "latin-1": ("common/late.py", "# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1")),
    "utf-16": ("common/late.py", "x = 1\n".encode("utf-16")),
    "utf-7": ("common/late.py", b"# coding: utf-7\n#+AAo-import os\n"),
    "utf-7 behind a carriage return": ("common/late.py", b"  \r# coding: utf-7\n#+AAo-import os\n"),
    "unicode escape": ("common/late.py", b"\n# vim: set fileencoding=unicode_escape :\n#\\nimport os\n"),
    "utf-7 in a text": ("notes.md", b"# coding: utf-7\n#+AAo-import os\n"),
    "mark and another encoding": ("common/late.py", b"\xef\xbb\xbf# coding: latin-1\n"),
    "start of Python": ("sitecustomize.py", b"x = 1\n"),
    "start of Python, a folder": ("usercustomize/__init__.py", b"x = 1\n"),
    "control character in a name": ("common/a\x1b[2K.py", b"x = 1\n"),
    "direction in a name": ("common/a\u202eyp.py", b"x = 1\n"),
    "letter of another script": ("common/nоise.py", b"x = 1\n"),
    "above": ("../late.py", b"x = 1\n"),
    "above, inside": ("common/../../late.py", b"x = 1\n"),
    "absolute": ("/tmp/late.py", b"x = 1\n"),
    "backslash": ("..\\late.py", b"x = 1\n"),
    "drive": ("C:/late.py", b"x = 1\n"),
    "folder": ("torch/", b""),
    "other letters": ("common/Noise.py", b"x = 1\n"),
    "list of files": (".info/CONTENT", b"pyproject.toml,00,8"),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_files_that_python_could_import_unseen_are_refused(site: SiteFolder, kind: str) -> None:
    name, body = UNSEEN[kind]
    content = package({"common/noise.py": GOOD, name: body})
    with pytest.raises(DataError, match="package is refused") as caught:
        approve(site, content)
    assert str(caught.value).isprintable()
    assert load_policy(site.path / "policy.toml").approved_app_digests == ()
    assert not runs(site, content)


def test_name_of_a_module_of_python_s_is_pointed_out(site: SiteFolder) -> None:
    lines = approve(site, package({"hashlib/__init__.py": "x = 1\n", "code.md": "x", "json.py": ""}))
    pointed = [line.split()[1] for line in lines if "takes the place of Python's own" in line]
    assert pointed == ["hashlib/__init__.py", "json.py"]


def test_name_of_an_installed_library_is_pointed_out(site: SiteFolder) -> None:
    """Not the names of this project's own modules, which are installed as well."""
    lines = approve(site, package({"numpy/random.py": "x = 1\n", "torch.py": "", "common/noise.py": GOOD}))
    pointed = [line.split()[1] for line in lines if "takes the place of the library" in line]
    assert pointed == ["numpy/random.py", "torch.py"]


def test_utf8_said_aloud_is_fine(site: SiteFolder) -> None:
    approve(site, package({"a.py": "# -*- coding: utf-8 -*-\nx = 'ε'\n", "b.py": "\ufeffx = 1\n"}))


def _entry(content: bytes, name: str) -> zipfile.ZipInfo:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.getinfo(name)


def _appended(content: bytes, *entries: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    sink = io.BytesIO(content)
    with zipfile.ZipFile(sink, "a") as archive:
        for entry, body in entries:
            archive.writestr(entry, body)
    return sink.getvalue()


def doubled(content: bytes) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate"):
        return _appended(content, (zipfile.ZipInfo("common/noise.py"), b"evil = 1\n"))


def linked(content: bytes) -> bytes:
    link = zipfile.ZipInfo("common/link.py")
    link.external_attr = 0o120777 << 16
    return _appended(content, (link, b"/etc/passwd"))


def compressed(content: bytes) -> bytes:
    late = zipfile.ZipInfo("common/late.py")
    late.compress_type = zipfile.ZIP_DEFLATED
    return _appended(content, (late, b"x = 1\n"))


def other_local_name(content: bytes) -> bytes:
    return content.replace(b"common/noise.py", b"common/evil_.py", 1)


def other_local_body(content: bytes) -> bytes:
    """A second local entry that the directory does not name: a program that reads from the front unpacks it."""
    body = b"evil = 1\n"
    local = zipfile.ZipInfo("common/noise.py")
    local.file_size = local.compress_size = len(body)
    local.CRC = zlib.crc32(body)
    head = local.FileHeader(False)
    return _shifted(content, head + body)


def prefixed(content: bytes) -> bytes:
    return b"#!/usr/bin/env python\n" + content


def _shifted(content: bytes, front: bytes) -> bytes:
    """Put bytes in front, with the directory's offsets corrected."""
    raw = bytearray(front + content)
    place = len(front) + content.index(b"PK\x01\x02")
    while raw[place : place + 4] == b"PK\x01\x02":
        offset = struct.unpack_from("<I", raw, place + 42)[0] + len(front)
        struct.pack_into("<I", raw, place + 42, offset)
        place += 46 + sum(struct.unpack_from("<HHH", raw, place + 28))
    struct.pack_into("<I", raw, place + 16, struct.unpack_from("<I", raw, place + 16)[0] + len(front))
    return bytes(raw)


def commented(content: bytes) -> bytes:
    sink = io.BytesIO(content)
    with zipfile.ZipFile(sink, "a") as archive:
        archive.comment = b"PK\x05\x06 hidden"
    return sink.getvalue()


def trailing(content: bytes) -> bytes:
    return content + b"\nmore"


def test_two_files_that_some_disks_take_for_one_are_refused() -> None:
    content = package({"common/noise.py": GOOD, "common/Noise.py": b"evil = 1\n"}, listed=False)
    with pytest.raises(DataError, match="in other letters"):
        read_files(content)


@pytest.mark.parametrize(
    "trick",
    [doubled, linked, compressed, other_local_name, other_local_body, prefixed, commented, trailing],
)
def test_archives_that_can_be_read_in_two_ways_are_refused(site: SiteFolder, trick: object) -> None:
    content = package({"common/noise.py": GOOD}, listed=False)
    read_files(content)
    assert _entry(content, "common/noise.py").file_size == len(GOOD)
    assert callable(trick)
    changed = trick(content)
    assert changed != content
    with pytest.raises(DataError, match=r"refused|no zip"):
        approve(site, changed)
    assert not runs(site, changed)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_read_files_damage_is_refused_in_one_line_or_read(content: bytes, place: int) -> None:
    raw = bytearray(package({"a.py": "x = 1\n"}))
    raw[place : place + len(content)] = content
    message = ""
    try:
        read_files(bytes(raw))
    except DataError as error:
        message = str(error)
    assert "\n" not in message


def test_own_app_is_read_and_named() -> None:
    files = read_files(build_package(ROOT))
    assert app_name(files) == "fedhypevae/fedhypevae"
    assert app_name({}) == app_name({"pyproject.toml": b"x ="}) == ""


def test_command_shows_escapes_and_says_what_is_replaced(site: SiteFolder) -> None:
    old, new = package({"a.py": "x = 1\n"}), package({"a.py": "x = 1 #\x1b[2K\n"})
    approve(site, old)
    (site.path / "app.fab").write_bytes(new)
    (site.path / "site.toml").write_text('name = "a"\nserver = "h:1"\n')
    done = CliRunner().invoke(
        commands, ["site", "approve", str(site.path), digest(new), "--file", str(site.path / "app.fab"), "--yes"]
    )
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert f"not approved any more: {digest(old)}" in done.output
