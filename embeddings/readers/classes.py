"""The classes of a site: those found in its labels, or those agreed, in tables as in arrays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, DataError
from common.names import WORD, WORDS, Task
from common.texts import is_text, neat, read_text
from embeddings.readers.walk import exists

_MAX_CLASSES = 10_000
_SHOWN = 20
_WHOLE = re.compile(r"-?[0-9]+")
_ZEROS = re.compile(r"(?<=\d)\.0+$")
# what pandas and spreadsheets write for an empty cell, and what people do
_MISSING = frozenset("nan -nan na <na> n/a #n/a #na n.a. none null nil nat missing unknown ? - -- . -1 -1.0".split())  # noqa: SIM905


def given_classes(text: str | None) -> tuple[str, ...] | None:
    """The class list of a command: `a,b,c`, or a text file with one name a line; None for none."""
    if text is None:
        return None
    if exists(Path(text)) and Path(text).is_file():
        return tuple(line for line in map(neat, read_text(Path(text)).split("\n")) if line)
    return tuple(map(neat, text.split(",")))


def class_list(given: Sequence[str] | None, found: Sequence[str]) -> tuple[str, ...]:
    """Return the class names in label order.

    Args:
        given: the list agreed in the federation, or None.
        found: the labels at this site.

    Returns:
        `given`, or the labels found: numbers by value, texts alphabetically.

    Raises:
        ConfigError: the given list is empty or names a class twice. DataError: far too many classes were
            found.
    """
    if given is not None:
        given = [neat(name) for name in given]
        if not all(is_text(name) and "\0" not in name for name in given):
            raise ConfigError("class list: expected names in UTF-8, found another encoding: save it as UTF-8")
        if not given or len(set(given)) != len(given) or not all(given):
            raise ConfigError(f"class list: expected different, non-empty names; found {', '.join(given) or 'none'}")
        if len(given) > _MAX_CLASSES:
            raise ConfigError(f"class list: expected at most {_MAX_CLASSES:,} names, found {len(given):,}")
        return tuple(given)
    names = set(found)
    if len(names) > _MAX_CLASSES:
        raise DataError(
            f"labels: found {len(names):,} different ones, expected at most {_MAX_CLASSES:,}; name the "
            "label column with --label-column"
        )
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


@dataclasses.dataclass(frozen=True)
class ArrayTexts:
    """An array of numbers or texts as texts: `texts` are the different ones, `places` (n,) say which a row has."""

    texts: tuple[str, ...]
    places: NDArray[np.int64]
    whole: bool

    def __getitem__(self, row: Any) -> str:
        return self.texts[self.places[row]]

    def per_row(self, values: Sequence[Any]) -> NDArray[Any]:
        """For each row what `values` say of its text."""
        return np.asarray(values)[self.places]


def array_texts(where: str, values: NDArray[Any]) -> ArrayTexts:
    """The texts of an array (n,) of whole numbers, texts or bytes in UTF-8, spelled as a table's cells are.

    Raises:
        DataError: bytes are in another encoding, or a text is none.
    """
    different, places = np.unique(values, return_inverse=True)
    try:
        texts = [one.decode() if isinstance(one, bytes) else str(one) for one in different.tolist()]
        if not all(is_text(text) and "\0" not in text for text in texts):
            raise ValueError
    except (ValueError, SystemError):  # the latter is numpy's, for a number that is no character at all
        raise DataError(f"{where}: expected texts in UTF-8, found another encoding: store them as UTF-8") from None
    return ArrayTexts(tuple(map(neat, texts)), places.reshape(-1), values.dtype.kind in "iu")


def array_classes(
    labels: Sequence[ArrayTexts], given: Sequence[str] | None, own: Sequence[str] | None = None
) -> tuple[tuple[str, ...], list[NDArray[np.int64]], str]:
    """The classes of arrays, and each row's class.

    Whole numbers are names where the classes are those found, or where every name of the list is a whole number. In
    another list, and in the archive's own, they are places from 0: in the archive's own if it has names of the list.

    Args:
        labels: of each array.
        given: the list agreed in the federation, or None.
        own: the archive's own list, or None.

    Returns:
        Names; for each array (n,) numbers of classes, -1 for none of them; what a label may be, in words.

    Raises:
        ConfigError, DataError: as `class_list`, or places seem to count from 1.
    """
    listed = own if given is None else given
    found = [text for one in labels for text in one.texts if text and not (one.whole and text.startswith("-"))]
    names = class_list(listed, found)
    by_place = listed is not None and not (given is not None and all(map(_WHOLE.fullmatch, names)))
    named = {name: number for number, name in enumerate(names)}
    order = own if own is not None and not named.keys().isdisjoint(own) else names
    placed = {str(number): named.get(name, -1) for number, name in enumerate(order)}
    stated = {text for one in labels if one.whole for text in one.texts}
    if by_place and str(len(order)) in stated and "0" not in stated:
        raise DataError(
            f"labels: found 1 to {len(order)} beside a list of {len(order)} names, whose places count from 0: "
            "subtract 1, or store the names"
        )
    numbers = []
    for one in labels:
        number = placed if by_place and one.whole else named
        numbers.append(one.per_row([number.get(text, -1) for text in one.texts]).astype(np.int64))
    if by_place and labels[0].whole:
        return names, numbers, f"0..{len(order) - 1}"
    return names, numbers, short(names)


def class_lines(names: Sequence[str], counts: Sequence[int], task: Task = "multiclass") -> list[str]:
    """The classes with their records, and remarks on names that may be a slip: lines for the site's own people."""
    shown = [f"{name} {count:,}" for name, count in zip(names[:_SHOWN], counts, strict=False)]
    shown += [f"... ({len(names) - _SHOWN:,} more)"] if len(names) > _SHOWN else []
    return [f"{len(names):,} {WORDS[task]}: {', '.join(shown)}", *remarks_on(names, WORD[task])]


def remarks_on(names: Sequence[str], what: str = "class") -> list[str]:
    """Names that may be a slip: unlike in case or blanks alone, or a word for a missing label."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(_ZEROS.sub("", name.casefold()).split()), []).append(name)
    lines = [
        f"remark: {' and '.join(map(repr, same))} differ only in case, blanks or '.0': are they one {what}?"
        for same in alike.values()
        if len(same) > 1
    ]
    lines += [
        f"remark: the {what} {name!r} is a usual word for a missing label: is it one?"
        for name in names
        if name.casefold() in _MISSING
    ]
    return lines


def short(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
