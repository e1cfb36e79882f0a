"""Text for a terminal, in lines of 80 columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from terminal import printable

WIDTH = 80


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
