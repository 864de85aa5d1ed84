"""Text from outside, shown so that no terminal and no reader is deceived by it."""

from __future__ import annotations

# Characters that count as printable and yet leave no mark: fillers, the blank of Braille, joiners, variation selectors.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_SELECTORS = (("\ufe00", "\ufe0f"), ("\U000e0100", "\U000e01ef"))


def plain(text: str, *, ascii_only: bool = False) -> str:
    r"""Write what a terminal obeys, hides or reorders as escapes: `\x1b`, `\u202e`, `\n`.

    That is every control character (line ends and tabs too), directional override, zero-width and other invisible
    character, separator but the space, lone surrogate and unassigned code point.

    Args:
        text: anything.
        ascii_only: escape every character beyond ASCII as well, for code: letters of other scripts look like ours.

    Returns:
        One line that is seen as it is.
    """
    return "".join(one if _is_seen(one, ascii_only) else one.encode("unicode_escape").decode() for one in text)


def _is_seen(one: str, ascii_only: bool) -> bool:
    if one.isascii() or ascii_only:
        return one.isascii() and one.isprintable()
    return one.isprintable() and one not in _BLANK and not any(low <= one <= high for low, high in _SELECTORS)
