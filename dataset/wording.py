"""Text for a terminal, in lines of 80 columns, or fewer where the terminal has fewer."""

from __future__ import annotations

from collections.abc import Iterator

from terminal import columns, columns_of, printable, terminal_width

WIDTH = 80
NARROWEST = 30  # below that lines are broken by the terminal itself


def width() -> int:
    """Columns of a line."""
    return max(NARROWEST, min(WIDTH, terminal_width() or WIDTH))


def wrapped(text: str, first: str = "", further: str = "") -> str:
    """Text in lines of `width` columns, at blanks where it can be, else anywhere.

    Args:
        first, further: what the first and the further lines begin with.
    """
    room, lines, line = width(), [], first
    begun = False
    for word in printable(text).split(" "):
        for piece in _pieces(word, room - columns(further)):
            fits = columns(line) + begun + columns(piece) <= room
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
        if columns(piece) + columns_of(character) > room:
            yield piece
            piece = ""
        piece += character
    yield piece
