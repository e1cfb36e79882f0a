"""What is said, in letters that every terminal has and with nothing in it that one would obey."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import shlex
import shutil
import sys
import threading
import unicodedata
from collections.abc import Iterator
from typing import Any

_IN_ASCII = {"…": "...", "–": "-", "×": "x", "±": "+-", "→": "->", "≤": "<=", "≥": ">="}
_IN_ASCII |= {"Σ": "sum", "β": "beta", "‖": "|", "\N{RIGHT SINGLE QUOTATION MARK}": "'"}


def terminal_width() -> int | None:
    """Columns of the terminal that is printed to; None where output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else None


def say(text: object = "", **more: Any) -> None:
    """Prints, with whatever a terminal would obey escaped; `more` are the arguments of `print`."""
    print(printable_lines(str(text)), **more)


PATIENCE = 1.5  # seconds after which one wants to know what is waited for
_said_by = {"this process": True}


@contextlib.contextmanager
def told(what: str, bar: bool = False) -> Iterator[None]:
    """Around work that may take long and says nothing itself: names it where it does.

    The line goes to standard error, so that what is printed stays what it is. With `bar` there is
    a progress bar, which a terminal shows and a file does not.
    """
    if not _said_by["this process"] or (bar and sys.stderr.isatty()):
        yield
        return
    timer = threading.Timer(PATIENCE, lambda: say(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def leave_telling_to_others() -> None:
    """From now on `told` says nothing here: of several processes one speaks."""
    _said_by["this process"] = False


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
    """Words as one pastes them into a shell: quoted where they must be, and printable."""
    return " ".join(map(_shell_word, map(str, words)))


def _shell_word(word: str) -> str:
    if "`" not in word and all(_is_shown(character, False) for character in word):
        return shlex.quote(word)

    def spelt(character: str) -> str:
        code = ord(character)
        if character in "`'\\" or code < 32 or _is_raw_byte(character):
            return f"\\x{code & 0xFF:02x}"
        return character if _is_shown(character, False) else f"\\U{code:08x}"

    return f"$'{''.join(map(spelt, word))}'"
