"""What is printed: in letters that the terminal has, with nothing in it that it would obey."""

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
"""Columns of a line of text, where it does not go to a narrower terminal."""
NARROWEST = 30  # below that lines are broken by the terminal itself
LONGEST_LINE = 100  # columns; a longer one is hard to read

_IN_ASCII = {"…": "...", "–": "-", "×": "x", "±": "+-", "→": "->", "≤": "<=", "≥": ">="}
_IN_ASCII |= {"Σ": "sum", "β": "beta", "‖": "|", "\N{RIGHT SINGLE QUOTATION MARK}": "'"}


def terminal_width() -> int | None:
    """Columns of the terminal that is printed to; None where output goes elsewhere."""
    return width_of(sys.stdout)


def width_of(stream: TextIO | None) -> int | None:
    """Columns of the terminal that a stream writes to; None where it is none."""
    if stream is None or not stream.isatty():
        return None
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    # shutil.get_terminal_size would ask standard output, which may go elsewhere (`… | tee log`).
    with contextlib.suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or WIDTH
    return WIDTH


def reading_width() -> int:
    """Columns for text that is laid out in lines: those of the terminal, but 100 at most.

    Where output goes to a pager (`--help | less`), standard error is on the terminal still.
    """
    widths = map(width_of, (sys.stdout, sys.stderr))
    return min(LONGEST_LINE, next(filter(None, widths), LONGEST_LINE))


def fitted(text: str, further: str = "", stream: TextIO | None = None) -> str:
    """Sentences as a terminal shows them best: lines too long for it are broken at blanks.

    What goes to a file or another program stays as it is. A command between back quotes stays in
    one piece, and so does every word, so that both can be pasted.

    Args:
        further: what the further lines begin with. stream: where it goes; None is stdout.
    """
    room = width_of(stream or sys.stdout)
    if room is None:
        return text
    return "\n".join(_broken(line, room, further) for line in text.split("\n"))


def wrapped(text: str, first: str = "", further: str = "") -> str:
    """A paragraph in lines of `text_width` columns, wherever it goes; what is not shown is escaped.

    As `fitted`, but a word that is wider than a line is cut.

    Args:
        first, further: what the first and the further lines begin with.
    """
    room = text_width()
    words = [
        (blank if part == 0 else "", piece)
        for blank, word in _words(printable(text))
        for part, piece in enumerate(_pieces(word, room - columns(further)))
    ]
    return _filled(words, room, first, further)


def paragraph(text: str, first: str = "", further: str = "") -> str:
    """A paragraph in lines of `reading_width` columns, wherever it goes; as `wrapped` otherwise.

    Every word stays whole.
    """
    return _filled(_words(text), reading_width(), first, further)


def text_width() -> int:
    """Columns of a line of text: 80, or fewer where the terminal has fewer."""
    return max(NARROWEST, min(WIDTH, terminal_width() or WIDTH))


def _broken(line: str, room: int, further: str) -> str:
    if columns(line) <= room:
        return line
    return _filled(_words(line), room, "", further if len(further) < room // 2 else "  ")


def _words(line: str) -> list[tuple[str, str]]:
    """The words of a line, a command between back quotes being one, and the blanks before each."""
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
    """A word, cut where it is wider than a line; a command stays whole."""
    piece = ""
    for character in word:
        if "`" not in word and columns(piece) + columns_of(character) > room:
            yield piece
            piece = ""
        piece += character
    yield piece


def columns(text: str) -> int:
    """How many columns a terminal needs for a line; Chinese, Japanese and Korean ones are wide."""
    return sum(columns_of(character) for character in text)


def columns_of(character: str) -> int:
    """How many columns a terminal needs for a character."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class _Fitted(logging.Formatter):
    """A log message in lines that fit the terminal; what a traceback quotes is escaped, too."""

    def format(self, record: logging.LogRecord) -> str:
        return fitted(printable_lines(super().format(record)), "  ", sys.stderr)


def hear(level: int, form: str = "%(levelname)s: %(message)s") -> None:
    """From now on log messages of this level and above are shown on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Fitted(form))
    logging.basicConfig(level=level, handlers=[handler])


def say(text: object = "", **more: Any) -> None:
    """Prints with everything escaped that a terminal would obey; `more` goes to `print`."""
    print(printable_lines(str(text)), **more)


PATIENCE = 1.5  # seconds after which a user wants to know what the program waits for
_notices = {"shown": True}


class Wait:
    """Prints what the program waits for, on a terminal, if it takes long; until `over`."""

    def __init__(self, what: str) -> None:
        self._timer = None
        if _notices["shown"] and sys.stderr.isatty():
            words = fitted(f"{what} ...", stream=sys.stderr)
            self._timer = threading.Timer(PATIENCE, lambda: say(words, file=sys.stderr, flush=True))
            self._timer.daemon = True
            self._timer.start()

    def over(self) -> None:
        """The wait is over: nothing is printed any more."""
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def notice_if_slow(what: str) -> Iterator[None]:
    """Around work that may take long and prints nothing itself: see `Wait`."""
    wait = Wait(what)
    try:
        yield
    finally:
        wait.over()


def silence_notices() -> None:
    """From now on `notice_if_slow` prints nothing here: of several processes only one does."""
    _notices["shown"] = False


_REMARKS = (
    # Pillow's on odd metadata and on large pictures; `python -m dataset check` has its own.
    {"category": UserWarning, "module": r"PIL\."},
    {"category": RuntimeWarning, "message": r"Image size \(\d+ pixels\) exceeds limit"},
    # More workers than cores are the user's choice, and torch's advice names no flag of ours.
    {"category": UserWarning, "message": "This DataLoader will create"},
)


def leave_out_remarks() -> None:
    """Silences what libraries say to programmers; a program that imports us hears it as before."""
    for remark in _REMARKS:
        warnings.filterwarnings("ignore", **remark)


def speak_to_any_terminal() -> None:
    """Makes a command survive names and signs that the terminal has no letters for.

    Where a terminal speaks ASCII or Latin-1 only, "…" becomes "..." and what has no such neighbour
    its escape; warnings are escaped as `say` does.
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
    """A log message that no name in it can turn into a command to the terminal."""

    def getMessage(self) -> str:
        return printable_lines(super().getMessage())


def plain(text: str) -> str:
    """Text with the punctuation that a terminal without Unicode lacks written otherwise."""
    return "".join(_IN_ASCII.get(character, character) for character in text)


# --- text that is shown ---------------------------------------------------------------------------


def printable(text: str, *, keep_bytes: bool = False) -> str:
    r"""Text with everything escaped that a terminal does not show or would obey.

    Control characters, marks that turn the direction of writing, and the bytes of file names that
    are not UTF-8 come out as Python writes them: "\x1b", "\u202e", "\xff".

    Args:
        keep_bytes: leaves those bytes as they are, for a file in which names are looked up.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c, keep_bytes) else _escaped(c) for c in text)


def printable_lines(text: str) -> str:
    """As `printable`, for text of several lines: the line ends stay."""
    return "\n".join(map(printable, text.split("\n")))


def _is_shown(character: str, keep_bytes: bool) -> bool:
    if _is_raw_byte(character):
        return keep_bytes
    # Wide blanks, and the joiners that Persian, Hindi and emoji are spelt with, are no surprise.
    return (
        character.isprintable()
        or character in "\u200c\u200d"
        or unicodedata.category(character) == "Zs"
    )


def _is_raw_byte(character: str) -> bool:
    """Whether this is how Python keeps a byte of a file name that is not UTF-8."""
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
    """Words as one pastes them into a shell: quoted where they must be, and printable.

    A path that begins with "-" is no flag.
    """
    paths = (f"./{word}" if _looks_like_flag(word) else str(word) for word in words)
    return " ".join(map(_shell_word, paths))


def _looks_like_flag(word: object) -> bool:
    return isinstance(word, PurePath) and str(word).startswith("-")


def _shell_word(word: str) -> str:
    if "`" not in word and all(_is_shown(character, False) for character in word):
        return shlex.quote(word)

    def spelt(character: str) -> str:
        if character not in "`'\\" and _is_shown(character, False):
            return character
        errors = "surrogateescape" if _is_raw_byte(character) else "surrogatepass"
        # As bytes, not as \u: a shell in the C locale knows no such characters.
        return "".join(f"\\x{byte:02x}" for byte in character.encode(errors=errors))

    return f"$'{''.join(map(spelt, word))}'"
