"""Printing: lines that fit the terminal, letters that it has, and no control characters."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import re
import shlex
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, TextIO

WIDTH = 80
"""Columns of a line of text, unless the terminal is narrower."""
NARROWEST = 30  # narrower terminals break the lines themselves
LONGEST_LINE = 100  # columns; a longer one is hard to read

_IN_ASCII = {"…": "...", "–": "-", "×": "x", "±": "+-", "→": "->", "≤": "<=", "≥": ">="}
_IN_ASCII |= {"Σ": "sum", "β": "beta", "‖": "|", "\N{RIGHT SINGLE QUOTATION MARK}": "'"}


def terminal_width() -> int | None:
    """Columns of the terminal that standard output goes to; None if it goes elsewhere."""
    return width_of(sys.stdout)


def width_of(stream: TextIO | None) -> int | None:
    """Columns of the terminal that a stream writes to; None if it writes elsewhere."""
    if stream is None or not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    # shutil.get_terminal_size would ask standard output, which may go elsewhere (`… | tee log`).
    with contextlib.suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or WIDTH
    return WIDTH


def reading_width() -> int:
    """Columns for text that is laid out in lines: those of the terminal, but at most 100.

    If output goes to a pager (`--help | less`), standard error still is the terminal.
    """
    widths = map(width_of, (sys.stdout, sys.stderr))
    return min(LONGEST_LINE, next(filter(None, widths), LONGEST_LINE))


def fitted(text: str, further: str = "", stream: TextIO | None = None) -> str:
    """Text whose lines are broken at blanks if they are too long for the terminal.

    Text for a file or another program is unchanged. Words, and commands between back quotes, are
    never broken, so that they can be pasted.

    Args:
        further: the beginning of further lines. stream: that the text goes to; None is stdout.
    """
    room = width_of(stream or sys.stdout)
    if room is None:
        return text
    return "\n".join(_broken(line, room, further) for line in text.split("\n"))


def wrapped(text: str, first: str = "", further: str = "") -> str:
    """A printable paragraph in lines of `text_width` columns, also outside a terminal.

    Words that are wider than a line are broken.

    Args:
        first, further: the beginnings of the first line and of further lines.
    """
    room = text_width()
    words = [
        (blank if part == 0 else "", piece)
        for blank, word in _words(printable(text))
        for part, piece in enumerate(_pieces(word, room - columns(further)))
    ]
    return _filled(words, room, first, further)


def paragraph(text: str, first: str = "", further: str = "") -> str:
    """A paragraph in lines of `reading_width` columns, also outside a terminal.

    Words are never broken. `first` and `further` are as for `wrapped`.
    """
    return _filled(_words(text), reading_width(), first, further)


def text_width() -> int:
    """Columns of a line of text: 80, or fewer if the terminal is narrower."""
    return max(NARROWEST, min(WIDTH, terminal_width() or WIDTH))


def _broken(line: str, room: int, further: str) -> str:
    if columns(line) <= room:
        return line
    return _filled(_words(line), room, "", further if len(further) < room // 2 else "  ")


def _words(line: str) -> list[tuple[str, str]]:
    """Pairs (blanks, word) of a line; a command between back quotes is one word."""
    return re.findall(r"( *)((?:`[^`]*`|[^ `]|`)+)", line)


def _filled(words: Iterable[tuple[str, str]], room: int, first: str, further: str) -> str:
    """Words, with the blanks before each, in lines of `room` columns."""
    lines, line = [], first
    for blank, word in words:
        if line.strip() and columns(line + blank + word) > room:
            lines.append(line.rstrip())
            line = further + word
        else:
            line += blank + word
    return "\n".join([*lines, line.rstrip()])


def _pieces(word: str, room: int) -> Iterator[str]:
    """A word in pieces of at most `room` columns; a command stays whole."""
    piece = ""
    for character in word:
        if "`" not in word and columns(piece) + columns_of(character) > room:
            yield piece
            piece = ""
        piece += character
    yield piece


def columns(text: str) -> int:
    """The columns that a line takes on a terminal; Chinese, Japanese, Korean letters take two."""
    return sum(columns_of(character) for character in text)


def columns_of(character: str) -> int:
    """The columns that a character takes on a terminal: 0, 1 or 2."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class _Fitted(logging.Formatter):
    """Formats log messages, with any traceback, in printable lines that fit the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return fitted(printable_lines(super().format(record)), "  ", sys.stderr)


def hear(level: int, form: str = "%(levelname)s: %(message)s") -> None:
    """Shows log messages of this level and above on standard error from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Fitted(form))
    logging.basicConfig(level=level, handlers=[handler])


def say(text: object = "", **more: Any) -> None:
    """Prints text with control characters escaped; `more` is passed to `print`."""
    print(printable_lines(str(text)), **more)


PATIENCE = 1.5  # seconds after which a user wonders what the program is doing
_notices = {"shown": True}


class Wait:
    """On a terminal, prints what the program is doing if `over` is not called soon."""

    def __init__(self, what: str) -> None:
        self._timer = None
        if _notices["shown"] and sys.stderr.isatty():
            # A bar may stand in the line: it is blotted out, and draws itself anew below.
            blank = " " * ((width_of(sys.stderr) or WIDTH) - 1)
            words = printable_lines(fitted(f"{what} ...", stream=sys.stderr))
            line = f"\r{blank}\r{words}"
            self._timer = threading.Timer(
                PATIENCE, lambda: print(line, file=sys.stderr, flush=True)
            )
            self._timer.daemon = True
            self._timer.start()

    def over(self) -> None:
        """Ends the wait: nothing is printed any more."""
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def notice_if_slow(what: str) -> Iterator[None]:
    """A `Wait` for the block, which may take long and prints nothing itself."""
    wait = Wait(what)
    try:
        yield
    finally:
        wait.over()


def silence_notices() -> None:
    """Makes `Wait` print nothing in this process: of several processes only one does."""
    _notices["shown"] = False


_REMARKS = (
    # Pillow's about odd metadata and large pictures; `python -m dataset check` has its own.
    {"category": UserWarning, "module": r"PIL\."},
    {"category": RuntimeWarning, "message": r"Image size \(\d+ pixels\) exceeds limit"},
    # More workers than cores are the user's choice, and torch's advice does not name our flag.
    {"category": UserWarning, "message": "This DataLoader will create"},
)


def leave_out_remarks() -> None:
    """Silences libraries' warnings to programmers in our commands, not when we are imported."""
    for remark in _REMARKS:
        warnings.filterwarnings("ignore", **remark)


def speak_to_any_terminal() -> None:
    """Makes printing succeed for characters that the terminal's encoding lacks.

    On a terminal of ASCII or Latin-1, "…" becomes "...", and a character without such a substitute
    is escaped. Control characters in log messages are escaped as by `say`.
    """
    codecs.register_error("plain", _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    logging.setLogRecordFactory(_PrintableRecord)


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(sign) or _escaped(sign) for sign in signs), error.end


class _PrintableRecord(logging.LogRecord):
    """A log record whose message has its control characters escaped."""

    def getMessage(self) -> str:
        return printable_lines(super().getMessage())


def plain(text: str) -> str:
    """Text with its punctuation and mathematical signs written in ASCII."""
    return "".join(_IN_ASCII.get(character, character) for character in text)


# --- text that is shown ---------------------------------------------------------------------------


def printable(text: str, *, keep_bytes: bool = False) -> str:
    r"""Text in which characters that a terminal would not show, or would obey, are escaped.

    Control characters, marks that change the direction of writing, and bytes of file names that are
    not UTF-8 become Python's escapes: "\x1b", "\u202e", "\xff".

    Args:
        keep_bytes: leaves those bytes unchanged, for files in which people look up names.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c, keep_bytes) else _escaped(c) for c in text)


def printable_lines(text: str) -> str:
    """`printable` for each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def _is_shown(character: str, keep_bytes: bool) -> bool:
    if _is_raw_byte(character):
        return keep_bytes
    # Other blanks of Unicode, and the joiners that Persian, Hindi and emoji need, are harmless.
    return (
        character.isprintable()
        or character in "\u200c\u200d"
        or unicodedata.category(character) == "Zs"
    )


def _is_raw_byte(character: str) -> bool:
    """Whether this is Python's surrogate for a byte of a file name that is not UTF-8."""
    return 0xDC80 <= ord(character) <= 0xDCFF


def _escaped(character: str) -> str:
    code = ord(character)
    if _is_raw_byte(character):
        return f"\\x{code - 0xDC00:02x}"
    return (
        character.encode("ascii", "backslashreplace").decode() if code > 127 else f"\\x{code:02x}"
    )


# --- commands that are shown ----------------------------------------------------------------------


def as_shell(*words: object) -> str:
    """Words to paste into a shell: quoted if necessary, and printable.

    A path that begins with "-" gets "./" in front, so that it is not taken for a flag.
    """
    texts = (
        f"./{word}" if isinstance(word, PurePath) and str(word).startswith("-") else str(word)
        for word in words
    )
    return " ".join(map(_shell_word, texts))


def _shell_word(word: str) -> str:
    if "`" not in word and all(_is_shown(character, False) for character in word):
        return shlex.quote(word)

    def spelt(character: str) -> str:
        if character not in "`'\\" and _is_shown(character, False):
            return character
        errors = "surrogateescape" if _is_raw_byte(character) else "surrogatepass"
        # As bytes, because a shell in the C locale does not understand \u.
        return "".join(f"\\x{byte:02x}" for byte in character.encode(errors=errors))

    return f"$'{''.join(map(spelt, word))}'"
