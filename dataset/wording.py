"""Text for a terminal: names without surprises in them, in lines of 80 columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

WIDTH = 80
_PLAIN = str.maketrans({"…": "...", "–": "-", "×": "x"})


def printable(text: str) -> str:
    r"""Text with everything escaped that a terminal does not show or would obey.

    Control characters, marks that turn the direction of writing, and the bytes of file names that
    are not UTF-8 come out as Python writes them: "\x1b", "\u202e", "\xff".
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return (
        character.encode("ascii", "backslashreplace").decode() if code > 127 else f"\\x{code:02x}"
    )


def plain(text: str) -> str:
    """Text with the punctuation that a terminal without Unicode lacks written otherwise."""
    return text.translate(_PLAIN)


def columns(text: str) -> int:
    """How many columns a terminal needs for a line; Chinese, Japanese and Korean ones are wide."""
    return sum(_columns_of(character) for character in text)


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(text: str, first: str = "", further: str = "") -> str:
    """Text in lines of at most 80 columns, at blanks where it can be, else anywhere.

    Args:
        first, further: what the first and the further lines begin with.
    """
    lines, line = [], first
    begun = False
    for word in printable(text).split(" "):
        for piece in _pieces(word, WIDTH - columns(further)):
            fits = columns(line) + begun + columns(piece) <= WIDTH
            if not fits:
                lines.append(line.rstrip())
                line, begun = further, False
            line += f" {piece}" if begun else piece
            begun = True
    return "\n".join([*lines, line.rstrip()])


def _pieces(word: str, room: int) -> Iterator[str]:
    """A word, cut where it is wider than a line."""
    piece = ""
    for character in word:
        if columns(piece) + _columns_of(character) > room:
            yield piece
            piece = ""
        piece += character
    yield piece
