"""Files of flags: `@FILE` on a command line stands for the words in it.

One or more flags per line; values with blanks are quoted; `#` starts a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset.decoding import reason
from dataset.files import is_file, is_gone
from machine import expanded
from storage import read_text
from utils import InputError, close_names, join_words

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
"""The recipes that come with the code; `@recipes/NAME.txt` is found there from any folder."""

MOST_BYTES = 1_000_000  # of a file of flags, or of a plan

# The pieces of a word: text in quotes, a character behind a backslash, any other character. A
# backslash stands for itself, as in C:\\photos, unless a blank, a quote or # follows.
_PIECE = re.compile(
    r"""'(?P<single>[^']*)'|"(?P<double>(?:[^"\\]|\\.)*)"|\\(?P<sign>[\s'"#])|(?P<other>[^\s'"])"""
)


def words_of(words: Sequence[str], above: tuple[str, ...] = ()) -> Iterator[str]:
    """The words of a command line, with each file of flags (`@FILE`) replaced by its words.

    Raises:
        InputError: a file cannot be read, or names itself.
    """
    for word in words:
        if not word.startswith("@"):
            yield word
        elif word == "@":
            raise InputError("@ names no file of flags; write @FILE")
        elif word in above:
            raise InputError(f"{word[1:]} names itself as a file of flags; remove that line")
        else:
            yield from words_of(list(_words_in_file(file_of_flags(word[1:]))), (*above, word))


def file_of_flags(name: str) -> Path:
    """The file that `@name` means: the file at that path, or else the recipe of that name."""
    file = Path(expanded(name))
    ours = RECIPES / file.name
    could_be_ours = str(file.parent) in (".", "recipes") and is_gone(file)
    return ours if could_be_ours and is_file(ours) else file


def _words_in_file(file: Path) -> Iterator[str]:
    """The words of a file of flags."""
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is not a regular file; @ is followed by a file of flags")
        text = read_text(file, MOST_BYTES)
    except FileNotFoundError as error:
        near = close_names(file.name, (path.name for path in RECIPES.glob("*.txt")))[:2]
        hint = near and f"did you mean {join_words([f'@recipes/{each}' for each in near], 'or')}?"
        raise InputError(f"there is no file of flags {file}; {hint or 'check its name'}") from error
    except (OSError, ValueError) as error:
        why = "it is not text in UTF-8" if isinstance(error, UnicodeError) else reason(error)
        raise InputError(
            f"the file of flags {file} cannot be read ({why}); check its name"
        ) from error
    for count, line in enumerate(text.splitlines(), 1):
        try:
            yield from _words_in_line(line)
        except ValueError as error:
            raise InputError(f"{file} line {count}: {error}") from error


def _words_in_line(line: str) -> Iterator[str]:
    """The words of a line: separated by blanks, quoted as in a shell; `#` begins a comment."""
    word, place, line = None, 0, line.strip()
    while place < len(line):
        if line[place].isspace():
            if word is not None:
                yield word
            word, place = None, place + 1
            continue
        if word is None and line[place] == "#":
            return
        piece = _PIECE.match(line, place)
        if piece is None:
            raise ValueError(f"the quotation mark {line[place]} has no partner; add or remove one")
        inside = piece[piece.lastgroup]
        if piece.lastgroup == "double":
            inside = inside.replace('\\"', '"')
        word, place = (word or "") + inside, piece.end()
    if word is not None:
        yield word
