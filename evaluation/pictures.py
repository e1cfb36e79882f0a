"""Pictures of images: queries and what the network finds nearest to them, and thumbnails.

Queries are drawn at random unless a caption says otherwise, so that a picture shows a network as it
is, failures included.
"""

from __future__ import annotations

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.base import ImageSet
from storage import write_atomically
from terminal import printable

# 900 pixels wide with ten neighbours: a README shows it pixel by pixel.
EDGE, NAME, CELL, GAP, AFTER_QUERY, LEGEND = 8, 114, 66, 4, 14, 30
RIGHT, WRONG, QUERY = (26, 127, 55), (207, 34, 46), (175, 184, 193)
# A right frame is also the wider one, for readers who do not tell green from red.
WIDTH_OF = {RIGHT: 4, WRONG: 2, QUERY: 1}
INK, PAPER, LINE_COLOUR = (31, 35, 40), (255, 255, 255), (37, 99, 205)
FONT_SIZE, LINE, MOST_LINES, LONGEST_NAME = 13, 16, 3, 200


def random_queries(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """One random image of each of `count` random classes: chosen by the seed, not by the result."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(labels))[:count]
    return np.array([rng.choice(np.flatnonzero(labels == label)) for label in classes])


def neighbours_picture(
    images: ImageSet,
    queries: np.ndarray,
    found: np.ndarray,
    gallery: ImageSet | None = None,
    caption: str = "",
) -> Image.Image:
    """A row a query: its class, the query, and what was found, framed green or red.

    Args:
        images: where the queries are from; they and the gallery number their classes alike.
        queries: (Q,) indices. found: (Q, top) indices into the gallery, or into `images` where
            there is no gallery. caption: how the queries were chosen; stands before the legend.
    """
    gallery = images if gallery is None else gallery
    font = ImageFont.load_default(size=FONT_SIZE)
    legend = _legend(caption, font)
    grid = EDGE + NAME + CELL + AFTER_QUERY + found.shape[1] * (CELL + GAP) - GAP + EDGE
    height = LEGEND + len(queries) * (CELL + GAP) - GAP + EDGE
    canvas = Image.new("RGB", (max(grid, legend.width + 2 * EDGE), height), PAPER)
    canvas.paste(legend, (EDGE, EDGE))
    for row, (query, neighbours) in enumerate(zip(queries, found, strict=True)):
        top = LEGEND + row * (CELL + GAP)
        label = images.labels[query]
        _write_name(canvas, top, images.class_names[label], font)
        canvas.paste(_framed(images, query, QUERY), (EDGE + NAME, top))
        for column, neighbour in enumerate(neighbours):
            left = EDGE + NAME + CELL + AFTER_QUERY + column * (CELL + GAP)
            colour = RIGHT if gallery.labels[neighbour] == label else WRONG
            canvas.paste(_framed(gallery, neighbour, colour), (left, top))
    return canvas


def contact_sheet(
    queries: ImageSet, found: np.ndarray, notes: np.ndarray, gallery: ImageSet
) -> Image.Image:
    """A row a query: its name, the query, and what was found, with a note below each.

    Args:
        queries: any images, named by their classes; nothing is known to be right or wrong.
        found: (Q, top) indices into the gallery. notes: (Q, top) short texts.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    step = CELL + LINE + GAP
    width = EDGE + NAME + CELL + AFTER_QUERY + found.shape[1] * (CELL + GAP) - GAP + EDGE
    canvas = Image.new("RGB", (width, EDGE + len(queries) * step - GAP + EDGE), PAPER)
    for row, (neighbours, texts) in enumerate(zip(found, notes, strict=True)):
        top = EDGE + row * step
        _write_name(canvas, top, queries.class_names[queries.labels[row]], font)
        canvas.paste(_framed(queries, row, QUERY), (EDGE + NAME, top))
        for column, (neighbour, note) in enumerate(zip(neighbours, texts, strict=True)):
            left = EDGE + NAME + CELL + AFTER_QUERY + column * (CELL + GAP)
            canvas.paste(_framed(gallery, neighbour, QUERY), (left, top))
            place = (left + CELL // 2, top + CELL)
            ImageDraw.Draw(canvas).text(place, str(note), INK, font=font, anchor="ma")
    return canvas


def class_values_picture(
    value: str, values: np.ndarray, train: ImageSet, shown: int = 10
) -> Image.Image:
    """What was learned for each class: all values by rank, and the classes at both ends.

    Args:
        value: its name, such as margin. values: (C,), one a class of `train`.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    order = np.argsort(values, kind="stable")
    row, curve = CELL + LINE + GAP, 96
    left = EDGE + NAME + CELL + AFTER_QUERY
    width = left + shown * (CELL + GAP) - GAP + EDGE
    canvas = Image.new("RGB", (width, LEGEND + curve + 2 * (row + GAP) + EDGE), PAPER)
    words = f"The learned {value} of each of the {len(values):,} training classes, by rank:"
    ImageDraw.Draw(canvas).text((EDGE, EDGE), words, INK, font=font)
    box = (left, LEGEND, width - EDGE, LEGEND + curve - LINE)
    _draw_ranked(canvas, box, values[order], font)
    ends = (f"smallest {value}s", order[:shown]), (f"largest {value}s", order[::-1][:shown])
    for number, (name, classes) in enumerate(ends):
        top = LEGEND + curve + number * (row + GAP)
        _write_name(canvas, top, name, font)
        for column, label in enumerate(classes):
            corner = (left + column * (CELL + GAP), top)
            canvas.paste(_framed(train, np.flatnonzero(train.labels == label)[0], QUERY), corner)
            place = (corner[0] + CELL // 2, top + CELL)
            ImageDraw.Draw(canvas).text(place, f"{values[label]:.3f}", INK, font=font, anchor="ma")
    return canvas


def _draw_ranked(
    canvas: Image.Image,
    box: tuple[int, int, int, int],
    values: np.ndarray,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Ascending values as a line in a box, with the lowest and the highest beside it."""
    left, top, right, bottom = box
    low, high = float(values[0]), float(values[-1])
    x = np.linspace(left, right, len(values))
    y = bottom - (values - low) / max(high - low, 1e-12) * (bottom - top)
    draw = ImageDraw.Draw(canvas)
    for value, height in ((low, bottom), (high, top)):
        draw.line((left, height, right, height), fill=QUERY)
        draw.text((left - GAP, height), f"{value:.3f}", INK, font=font, anchor="rm")
    draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=LINE_COLOUR, width=3)


def below(pictures: list[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    width, height = max(p.width for p in pictures), sum(p.height for p in pictures)
    canvas = Image.new("RGB", (width, height), PAPER)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        InputError: it cannot be written there.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def _framed(images: ImageSet, index: int, colour: tuple[int, int, int]) -> Image.Image:
    """The image, whole and in its proportions, in a cell with a frame of this colour."""
    inside = CELL - 2 * (max(WIDTH_OF.values()) + 1)
    picture = _picture(images, int(index))
    scale = inside / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    corner = tuple((CELL - side) // 2 for side in size)
    cell.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
    box = (0, 0, CELL - 1, CELL - 1)
    ImageDraw.Draw(cell).rectangle(box, outline=colour, width=WIDTH_OF[colour])
    return cell


def _picture(images: ImageSet, index: int) -> Image.Image:
    """The image; a grey square where it can no longer be read."""
    try:
        return Image.fromarray(images.read(index))
    except OSError:
        return Image.new("RGB", (CELL, CELL), QUERY)


def _legend(caption: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One line: the caption, how to read a row, and what the two frames mean."""
    parts = [
        (f"{caption}. " if caption else "") + "Nearest images, left to right:",
        *(RIGHT, "same class"),
        *(WRONG, "another class"),
    ]
    canvas = Image.new("RGB", (2000, LINE), PAPER)
    draw, left = ImageDraw.Draw(canvas), 0
    for part in parts:
        if isinstance(part, str):
            draw.text((left, 0), part, INK, font=font)
            left += round(font.getlength(part)) + 10
        else:
            box = (left, 1, left + LINE - 3, LINE - 2)
            draw.rectangle(box, outline=part, width=WIDTH_OF[part])
            left += LINE + 3
    return canvas.crop((0, 0, left - 10, LINE))


def _write_name(canvas: Image.Image, top: int, name: str, font: ImageFont.FreeTypeFont) -> None:
    lines = _wrapped(name, font, NAME - GAP - EDGE)
    corner = (EDGE, top + (CELL - LINE * len(lines)) // 2)
    for number, line in enumerate(lines):
        place = (corner[0], corner[1] + number * LINE)
        ImageDraw.Draw(canvas).text(place, line, INK, font=font)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A class name as a few lines; breaks after blanks, `_` and `-`, or inside a word too long."""
    text = printable(text)
    lines = [""]
    for word in re.findall(r"[^\s_-]*[\s_-]?", text[:LONGEST_NAME]):
        if lines[-1] and font.getlength(lines[-1] + word.rstrip()) > width:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength((lines[-1] + character).rstrip()) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1] = lines[MOST_LINES - 1].rstrip()[:-1] + "…"
    return [line.strip() for line in lines[:MOST_LINES]]


# --- thumbnails of a page -------------------------------------------------------------------------


class Thumbnails:
    """Small pictures for an HTML page, each once, within a budget of bytes.

    `want` gives a picture a number at once; `encode` makes them all at the end. Those that a page
    cannot do without go first; of the others as many as the budget has room for are made.
    """

    side, quality = 64, 72

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._numbers: dict[tuple[str, str, str], int] = {}
        self._sources: list[tuple[ImageSet, int]] = []
        self._needed: set[int] = set()

    def want(self, images: ImageSet, index: int, *, needed: bool = True) -> int:
        """The number of the picture of an image."""
        key = (images.name, images.split, images.paths[int(index)])
        number = self._numbers.setdefault(key, len(self._numbers))
        if number == len(self._sources):
            self._sources.append((images, int(index)))
        if needed:
            self._needed.add(number)
        return number

    def encode(self) -> list[str | None]:
        """Data addresses by number; None where an image cannot be read, or the budget is spent."""
        found: list[str | None] = [None] * len(self._sources)
        rest = [number for number in range(len(found)) if number not in self._needed]
        left = self.budget
        with ThreadPoolExecutor(4) as threads:
            for numbers in (sorted(self._needed), rest):
                for start in range(0, len(numbers), 64):
                    if left <= 0 and numbers is rest:
                        return found
                    part = numbers[start : start + 64]
                    for number, address in zip(part, threads.map(self._address, part), strict=True):
                        found[number] = address
                        left -= len(address or "")
        return found

    def _address(self, number: int) -> str | None:
        images, index = self._sources[number]
        try:
            picture = Image.fromarray(images.read(index))
        except OSError:
            return None
        picture.thumbnail((self.side, self.side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=self.quality, method=2)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
