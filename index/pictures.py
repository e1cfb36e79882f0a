"""Answers as a contact sheet: a row for each query, and a caption below every picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from dataset.decoding import central_part, decode
from evaluation.lettering import Lettering
from evaluation.pictures import blank
from index.asking import Answer, Hit

SIDE, GAP, EDGE = 140, 8, 12
WORDS = Lettering(13)
LINES = 3  # of a caption: place and cosine, label, id
INK, PALE = (31, 35, 40), (110, 118, 129)
FRAMES = {"same": (26, 127, 55), "unsure": (154, 103, 0), "different": (207, 34, 46)}
PLAIN = (175, 184, 193)


def sheet(answers: Sequence[Answer], upright: bool = True) -> Image.Image:
    """A picture with the queries on the left, and the hits of each beside it.

    If there are verdicts, they are in the captions, and frames are green, amber and red.

    Args:
        upright: whether pictures are turned according to their EXIF orientation.

    Raises:
        InputError: it would be larger than programs can open.
    """
    most = max((len(answer.hits) for answer in answers), default=0)
    row = SIDE + LINES * WORDS.line + 2 * GAP
    size = (2 * EDGE + (most + 1) * (SIDE + GAP) + GAP, 2 * EDGE + len(answers) * row - GAP)
    canvas = blank(size, len(answers), most)
    for number, answer in enumerate(answers):
        top = EDGE + number * row
        _put(canvas, (EDGE, top), answer.query, PLAIN, ["query", "", answer.query], upright)
        for place, hit in enumerate(answer.hits, 1):
            corner = (EDGE + place * (SIDE + GAP) + GAP, top)
            frame = FRAMES.get(hit.verdict, PLAIN)
            _put(canvas, corner, hit.entry.path, frame, _words(place, hit), upright)
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
    upright: bool,
) -> None:
    """Draws a whole picture in a square with a frame, and its caption."""
    left, top = corner
    draw = ImageDraw.Draw(canvas)
    try:
        picture = Image.fromarray(central_part(decode(path, upright)))
        picture = ImageOps.contain(picture, (SIDE - 6, SIDE - 6), Image.Resampling.LANCZOS)
        middle = (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2)
        canvas.paste(picture, middle)
    except Exception:  # Pillow reports damage through a dozen unrelated types
        why = "cannot be read" if os.path.lexists(path) else "file gone"
        corner = (left + (SIDE - round(WORDS.length(why))) // 2, top + (SIDE - WORDS.line) // 2)
        WORDS.draw(canvas, corner, why, PALE)
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=frame, width=2)
    for number, text in enumerate(words):
        place = (left, top + SIDE + 2 + number * WORDS.line)
        # Of a long path the end, in which paths differ.
        WORDS.draw(canvas, place, WORDS.end_of(text, SIDE), INK if number < 2 else PALE)
