"""Small text files that people write and programs save: one reader for all of them, and one spelling of a name."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.errors import ConfigError, DataError, FedHypeVAEError

# Python's `strip` leaves marks of width zero, which nobody sees: byte order mark, zero-width space and joiners
_ENDS = re.compile(r"^[\s\ufeff\u200b-\u200f]+|[\s\ufeff\u200b-\u200f]+$")


@contextlib.contextmanager
def open_text(
    path: Path, error: type[FedHypeVAEError] = ConfigError, *, newline: str | None = None
) -> Iterator[TextIO]:
    """Open a text file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        error: what is raised for another encoding.
        newline: as in `open`.

    Raises:
        error: the text is in another encoding. It is not guessed: Windows-1252 and its like can't be told apart.
        OSError: the file can't be opened; each caller knows what its absence means.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        raise error(f"{path}: expected text in UTF-8, found another encoding: save it as UTF-8") from None


def read_text(path: Path, error: type[FedHypeVAEError] = ConfigError) -> str:
    """The whole of a text file; raises as `open_text`, and for a text with NUL characters, as UTF-16 may look."""
    with open_text(path, error) as file:
        text = file.read()
    if "\0" in text:
        raise error(f"{path}: expected text in UTF-8, found NUL characters (is it UTF-16?): save it as UTF-8")
    return text


def read_toml(path: Path, error: type[FedHypeVAEError] = ConfigError) -> dict[str, Any]:
    """The values of a TOML file; raises as `read_text`, and for a text that is no TOML."""
    try:
        return tomllib.loads(read_text(path, error))
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is no TOML: {reason}") from None


def read_json(path: Path, error: type[FedHypeVAEError] = ConfigError) -> Any:
    """The value of a JSON file; raises as `read_text`, and for a text that is no JSON."""
    try:
        return json.loads(read_text(path, error))
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is no JSON: {reason}") from None


def read_object(path: Path, cure: str, error: type[FedHypeVAEError] = DataError) -> dict[str, Any]:
    """The object of a JSON file; raises as `read_json`, and with a cure where the file is missing or no object."""
    try:
        content = read_json(path, error)
    except OSError as reason:
        raise error(f"{path} can't be read ({reason.strerror}): {cure}") from None
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object: {cure}")
    return content


def object_or_empty(path: Path) -> dict[str, Any]:
    """As `read_object`; empty where there is none, for what is looked at in passing."""
    try:
        return read_object(path, "")
    except FedHypeVAEError:
        return {}


def object_in(output: str) -> dict[str, Any]:
    """The JSON object in a program's output that also holds lines for people; empty where there is none."""
    start = output.find("{")
    try:
        found = json.loads(output[start:]) if start >= 0 else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def neat(text: str) -> str:
    """A name as it is compared: in Unicode's composed form (NFC), without blanks and invisible marks at its ends."""
    return trimmed(unicodedata.normalize("NFC", text))


def trimmed(text: str) -> str:
    """A text without blanks and invisible marks at its ends."""
    return _ENDS.sub("", text)


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: a file name or an argument in another encoding can't."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
