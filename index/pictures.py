"""Answers as a contact sheet: a row for each query, and under every picture what it is."""

from __future__ import annotations

import os
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dataset.decoding import central_part, decode
from evaluation.pictures import save_picture
from index.asking import Answer, Hit
from terminal import printable

__all__ = ["save_picture", "sheet"]

SIDE, GAP, EDGE, SIZE, LINE = 140, 8, 12, 13, 17
LINES = 3  # under a picture: place and cosine, label, id
INK, PALE, PAPER = (31, 35, 40), (110, 118, 129), (255, 255, 255)
FRAMES = {"same": (26, 127, 55), "unsure": (154, 103, 0), "different": (207, 34, 46)}
PLAIN = (175, 184, 193)


def sheet(answers: Sequence[Answer], upright: bool = True) -> Image.Image:
    """The queries on the left, what was found for each beside them.

    Where there are thresholds the frames are green, amber and red, and the word stands below.

    Args:
        upright: whether pictures are turned as their EXIF orientation says.
    """
    font = ImageFont.load_default(size=SIZE)
    most = max((len(answer.hits) for answer in answers), default=0)
    row = SIDE + LINES * LINE + 2 * GAP
    size = (2 * EDGE + (most + 1) * (SIDE + GAP) + GAP, 2 * EDGE + len(answers) * row - GAP)
    canvas = Image.new("RGB", size, PAPER)
    for number, answer in enumerate(answers):
        top = EDGE + number * row
        _put(canvas, (EDGE, top), answer.query, PLAIN, ["query", "", answer.query], font, upright)
        for place, hit in enumerate(answer.hits, 1):
            corner = (EDGE + place * (SIDE + GAP) + GAP, top)
            frame = FRAMES.get(hit.verdict, PLAIN)
            _put(canvas, corner, hit.entry.path, frame, _words(place, hit), font, upright)
    return canvas


def _words(place: int, hit: Hit) -> list[str]:
    note = "same file" if hit.same_file else hit.verdict
    return [f"{place}  {hit.score:.3f}  {note}".rstrip(), hit.entry.label or "", hit.entry.id]


def _put(
    canvas: Image.Image,
    corner: tuple[int, int],
    path: str,
    frame: tuple[int, int, int],
    words: Sequence[str],
    font: ImageFont.FreeTypeFont,
    upright: bool,
) -> None:
    """A picture, whole, in a square with a frame, and words below it."""
    left, top = corner
    draw = ImageDraw.Draw(canvas)
    try:
        picture = Image.fromarray(central_part(decode(path, upright)))
        picture = ImageOps.contain(picture, (SIDE - 6, SIDE - 6), Image.Resampling.LANCZOS)
        middle = (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2)
        canvas.paste(picture, middle)
    except Exception:  # Pillow reports damage through a dozen unrelated types
        why = "cannot be read" if os.path.lexists(path) else "file gone"
        draw.text((left + SIDE // 2, top + SIDE // 2), why, PALE, font=font, anchor="mm")
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=frame, width=2)
    for number, text in enumerate(words):
        place = (left, top + SIDE + 2 + number * LINE)
        draw.text(place, _fitted(text, font), INK if number < 2 else PALE, font=font)


def _fitted(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Text as wide as a picture; of a longer one its end, which is what tells paths apart."""
    text = printable(text)[-200:]
    if font.getlength(text) <= SIDE:
        return text
    while font.getlength(f"…{text}") > SIDE:
        text = text[1:]
    return f"…{text}"
