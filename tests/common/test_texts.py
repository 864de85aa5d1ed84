"""Text files in every encoding that a hospital's programs save: read right, or refused in one line."""

from __future__ import annotations

import codecs
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from common.texts import (
    is_text,
    neat,
    object_in,
    object_or_empty,
    open_text,
    read_json,
    read_object,
    read_text,
    read_toml,
)

WORDS = "gutartig\nbösartig\n"
RIGHT = {
    "utf-8": WORDS.encode(),
    "utf-8 with a mark": codecs.BOM_UTF8 + WORDS.encode(),
    "windows line ends": WORDS.replace("\n", "\r\n").encode(),
    "old mac line ends": WORDS.replace("\n", "\r").encode(),
}
REFUSED = {
    "cp1252": WORDS.encode("cp1252"),
    "latin-1": WORDS.encode("latin-1"),
    "mac-roman": WORDS.encode("mac-roman"),
    "cp850": WORDS.encode("cp850"),
    "utf-16 with a mark": WORDS.encode("utf-16"),
    "utf-16-be with a mark": codecs.BOM_UTF16_BE + WORDS.encode("utf-16-be"),
    "utf-16-le without a mark": b"a\0b\0\n\0",
    "utf-16-be without a mark": b"\0a\0b\0\n",
    "utf-32": WORDS.encode("utf-32"),
    "half a letter": WORDS.encode()[:-8],
    "a surrogate": b"a\xed\xb3\xb6\n",
}


@pytest.mark.parametrize("name", RIGHT)
def test_read_text_reads_utf_8_with_and_without_a_mark(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.txt").write_bytes(RIGHT[name])
    assert read_text(tmp_path / "x.txt") == WORDS


@pytest.mark.parametrize("error", [ConfigError, DataError])
@pytest.mark.parametrize("name", REFUSED)
def test_read_text_refuses_other_encodings_in_one_line(
    tmp_path: Path, name: str, error: type[ConfigError | DataError]
) -> None:
    (tmp_path / "x.txt").write_bytes(REFUSED[name])
    with pytest.raises(error, match=r"x\.txt: expected text in UTF-8.*save it as UTF-8") as caught:
        read_text(tmp_path / "x.txt", error)
    assert "\n" not in str(caught.value)


def test_read_text_leaves_a_missing_file_to_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none.txt")


def test_open_text_keeps_line_ends_where_asked(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(codecs.BOM_UTF8 + b"a\r\nb")
    with open_text(tmp_path / "x.csv", newline="") as file:
        assert file.read() == "a\r\nb"


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_read_toml_and_json_take_a_mark(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "x.toml").write_bytes(mark + "a = 'ö'\r\n".encode())
    (tmp_path / "x.json").write_bytes(mark + json.dumps({"a": "ö"}).encode())
    assert read_toml(tmp_path / "x.toml") == read_json(tmp_path / "x.json") == {"a": "ö"}


@pytest.mark.parametrize("content", [b"{", b"=", b"[" * 100_000, b'{"a": 1}}', b"\xff", b"a\0"])
def test_read_toml_and_json_refuse_in_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    for read in (read_toml, read_json):
        with pytest.raises(ConfigError, match="x"):
            read(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  benign\t", "benign"),
        ("\ufeffbenign", "benign"),
        ("\u200b \ufeff benign \u200b", "benign"),
        ("\u00a0benign\u3000", "benign"),
        ("O\u0308dem", "\u00d6dem"),
        ("\u00d6dem", "\u00d6dem"),
        ("\u1100\u1161", "\uac00"),
        ("in situ", "in situ"),
        ("a\u200db", "a\u200db"),
        ("", ""),
        ("\ufeff", ""),
    ],
)
def test_neat_is_one_spelling(text: str, wanted: str) -> None:
    assert neat(text) == wanted


@given(st.text(), st.text(alphabet=" \t\n\u00a0\ufeff\u200b", max_size=3))
def test_neat_joins_every_spelling_and_changes_nothing_twice(text: str, blanks: str) -> None:
    once = neat(text)
    assert neat(once) == once
    assert neat(blanks + unicodedata.normalize("NFC", text) + blanks) == once
    assert neat(unicodedata.normalize("NFD", text)) == once
    assert neat(unicodedata.normalize("NFC", text)) == once


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), min_size=1))
def test_neat_leaves_plain_names(text: str) -> None:
    assert neat(text) == text.strip()


def test_is_text_knows_names_that_are_no_utf_8() -> None:
    assert is_text("größe")
    assert not is_text(b"gr\xf6\xdfe.png".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("content", [None, b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_read_object_says_what_to_do_where_there_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json"):
        read_object(path, "fetch it again")
    assert object_or_empty(path) == {}
    path.write_text('{"a": 1}')
    assert read_object(path, "") == object_or_empty(path) == {"a": 1}


@pytest.mark.parametrize(
    ("output", "found"), [("", {}), ("warning\n", {}), ('note\n{"a": 1}\n', {"a": 1}), ("{[", {}), ('x {"a": 1', {})]
)
def test_object_in_an_output_is_found_after_lines_for_people(output: str, found: dict[str, int]) -> None:
    assert object_in(output) == found
