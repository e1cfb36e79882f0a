"""Text in pictures, in any script: each letter in a font of this machine that has it.

Pillow comes with a font that has the letters of English. Letters that it lacks are written in the
first font of this machine that has them; letters that no font has are written as Python's escapes.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from terminal import printable

FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
SUFFIXES = (".ttf", ".otf", ".ttc")
UNLIKE = re.compile("bold|italic|oblique|mono|condensed|narrow|light|thin|black|serif", re.I)
MISSING = "\U0010ffff"  # a character that no font has; fonts draw all missing ones alike
LONGEST = 200  # the rest of a longer name is ignored

Font = ImageFont.FreeTypeFont


class Lettering:
    """Measures and draws text of one size; `line` is the height of a line in pixels."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.line = size + 3

    def length(self, text: str) -> float:
        """The width of a line of text in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(self, canvas: Image.Image, place: tuple[int, int], text: str, ink: tuple) -> None:
        """Draws a line of text with its upper left corner at `place`."""
        pen, (left, top) = ImageDraw.Draw(canvas), place
        ascent = plain_font(self.size).getmetrics()[0]
        for font, part in self._runs(text):
            pen.text((left, top + ascent), part, ink, font=font, anchor="ls")
            left += round(font.getlength(part))

    def wrapped(self, text: str, width: int, most: int) -> list[str]:
        """Text in at most `most` lines, broken after blanks, `_` and `-`, or within a long word."""
        lines = [""]
        for word in re.findall(r"[^\s_-]*[\s_-]?", self.written(text[:LONGEST])):
            if lines[-1] and self.length(lines[-1] + word.rstrip()) > width:
                lines.append("")
            for letter in clusters(word):
                if lines[-1] and self.length((lines[-1] + letter).rstrip()) > width:
                    lines.append("")
                lines[-1] += letter
        if len(lines) > most:
            last = list(clusters(lines[most - 1].rstrip()))
            while last and self.length("".join(last) + "…") > width:
                last.pop()
            lines[most - 1] = "".join(last) + "…"
        return [line.strip() for line in lines[:most]]

    def end_of(self, text: str, width: int) -> str:
        """As much of the end of a text as fits; that is where names of files differ."""
        letters = list(clusters(self.written(text[-LONGEST:])))
        if self.length("".join(letters)) <= width:
            return "".join(letters)
        ends = ["…" + "".join(letters[start:]) for start in range(1, len(letters) + 1)]
        fits = bisect_left(ends, True, key=lambda end: self.length(end) <= width)
        return ends[min(fits, len(ends) - 1)]

    def written(self, text: str) -> str:
        """Text in which characters that no font can show are escaped as in Python."""
        return "".join(
            letter if self._font_of(letter) else letter.encode("ascii", "backslashreplace").decode()
            for letter in clusters(printable(text))
        )

    def _runs(self, text: str) -> Iterator[tuple[Font, str]]:
        """The text in parts that are written in one font each."""
        font, named = plain_font(self.size), []
        for letter in clusters(text):
            if not letter.isspace():  # blanks must not split words that run from right to left
                font = self._font_of(letter) or font
            named.append((font, letter))
        for _, run in groupby(named, key=lambda found: id(found[0])):
            fonts, letters = zip(*run, strict=True)
            yield fonts[0], "".join(letters)

    def _font_of(self, letter: str) -> Font | None:
        return font_of(letter, self.size)


def clusters(text: str) -> Iterator[str]:
    """The letters of a text, each with its combining marks and joined characters."""
    letter = ""
    for character in text:
        joined = letter.endswith("\u200d") or character in "\u200c\u200d\ufe0e\ufe0f"
        if letter and not (joined or unicodedata.category(character).startswith("M")):
            yield letter
            letter = ""
        letter += character
    if letter:
        yield letter


@functools.cache
def plain_font(size: int) -> Font:
    """Pillow's own font; always the same object, so that letters are grouped by their font."""
    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=4096)
def font_of(letter: str, size: int) -> Font | None:
    """The first font that has a letter: Pillow's own, or one of this machine; None if none has."""
    plain = plain_font(size)
    if not isinstance(plain, ImageFont.FreeTypeFont) or _has(plain, letter):
        return plain
    for path in font_files():
        font = _opened(path, size)
        if font is not None and _has(font, letter):
            return font
    return None


@functools.cache
def font_files() -> tuple[Path, ...]:
    """The font files of this machine, regular sans-serif ones first."""
    found = [
        Path(folder, name)
        for root in FOLDERS
        for folder, _, names in os.walk(Path(root).expanduser())
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]
    return tuple(sorted(found, key=lambda path: (UNLIKE.search(path.stem) is not None, path.name)))


@functools.lru_cache(maxsize=256)
def _opened(path: Path, size: int) -> Font | None:
    try:
        return ImageFont.truetype(path, size)
    except (OSError, ValueError):  # not a font, or one without outlines
        return None


def _has(font: Font, letter: str) -> bool:
    """Whether a font has all characters of a letter; invisible ones count as present."""
    missing = _drawn(font, MISSING)
    return all(
        character.isascii() or character in "\u200c\u200d\ufe0e\ufe0f"
        or _drawn(font, character) != missing
        for character in letter
    )  # fmt: skip


def _drawn(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)
