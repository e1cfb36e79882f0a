"""Names in pictures, whatever their script: fonts that this machine has, letter by letter.

Pillow comes with a font that has the letters of English. Letters that it lacks are written in the
first font of this machine that has them; those that no font has are written as their escape.
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
MISSING = "\U0010ffff"  # a character that no font has: how it is drawn is how missing ones are
LONGEST = 200  # characters of a name that are looked at

Font = ImageFont.FreeTypeFont


class Lettering:
    """Text of one size, measured and drawn; `line` is the height of one in pixels."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.line = size + 3

    def length(self, text: str) -> float:
        """How wide a line of text is, in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(self, canvas: Image.Image, place: tuple[int, int], text: str, ink: tuple) -> None:
        """Draws a line with its upper left corner at a place."""
        pen, (left, top) = ImageDraw.Draw(canvas), place
        ascent = plain_font(self.size).getmetrics()[0]
        for font, part in self._runs(text):
            pen.text((left, top + ascent), part, ink, font=font, anchor="ls")
            left += round(font.getlength(part))

    def wrapped(self, text: str, width: int, most: int) -> list[str]:
        """Text in lines, at most `most`; breaks after blanks, `_` and `-`, or in a long word."""
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
        """The end of a text, where names of files differ, as far as it fits."""
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
        """The parts of a text that one font writes."""
        font, named = plain_font(self.size), []
        for letter in clusters(text):
            if not letter.isspace():  # a blank parts no words that are written from the right
                font = self._font_of(letter) or font
            named.append((font, letter))
        for _, run in groupby(named, key=lambda found: id(found[0])):
            fonts, letters = zip(*run, strict=True)
            yield fonts[0], "".join(letters)

    def _font_of(self, letter: str) -> Font | None:
        return font_of(letter, self.size)


def clusters(text: str) -> Iterator[str]:
    """The letters of a text, each with the marks that stand on it and what is joined to it."""
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
    """Pillow's own font, one of each size: letters of one font are measured and drawn together."""
    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=4096)
def font_of(letter: str, size: int) -> Font | None:
    """The first font that has a letter: Pillow's own, or one of this machine; None: no font has."""
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
    """The font files of this machine, upright ones of even strokes first."""
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
    except (OSError, ValueError):  # no font after all, or one without outlines
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
