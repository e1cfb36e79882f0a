"""Pictures of images: queries and what the network finds nearest to them.

Queries are drawn at random unless a caption says otherwise, so that a picture is a fair sample,
failures included.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.base import ImageSet
from evaluation.lettering import Lettering
from storage import write_content
from utils import InputError

# 900 pixels wide with ten neighbours, so that a README shows it without scaling.
EDGE, NAME, CELL, GAP, AFTER_QUERY, LEGEND = 8, 114, 66, 4, 14, 30
RIGHT, WRONG, QUERY = (26, 127, 55), (207, 34, 46), (175, 184, 193)
# The frame of a right image is also wider, for readers who cannot tell green from red.
WIDTH_OF = {RIGHT: 4, WRONG: 2, QUERY: 1}
INK, PAPER, LINE_COLOUR = (31, 35, 40), (255, 255, 255), (37, 99, 205)
FONT_SIZE, LINE, MOST_LINES = 13, 16, 3
# Larger sizes for pictures with names below them.
NAMED_CELL, NAMED_NAME, NAME_LINES, FAINT = 96, 150, 2, (101, 109, 118)
NOTE, SMALL = Lettering(FONT_SIZE), Lettering(11)
MOST_PIXELS = 2 * 89_478_485  # Pillow itself opens no larger picture


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
    *,
    cosines: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> Image.Image:
    """One row per query: its class, the query, and what was found, framed green or red.

    Args:
        images: hold the queries; the gallery, if there is one, numbers its classes in the same way.
        queries: (Q,) indices. found: (Q, top) indices into the gallery, or into `images` if there
            is no gallery. caption: how the queries were chosen; placed in front of the legend.
        cosines: (Q, top); if given, each picture has its cosine, class and file below it.
        notes: (Q,) texts below the names of the queries, such as a rank.
    """
    gallery = images if gallery is None else gallery
    legend = _legend(caption)
    rows = []
    for row, (query, neighbours) in enumerate(zip(queries, found, strict=True)):
        label = images.labels[query]
        cells = [
            _Cell(gallery, int(n), RIGHT if gallery.labels[n] == label else WRONG)
            for n in neighbours
        ]
        if cosines is not None:
            cells = [
                cell._replace(text=_about(gallery, cell.index, f"{value:.3f}"))
                for cell, value in zip(cells, cosines[row], strict=True)
            ]
        more = [images.paths[int(query)]] if cosines is not None else []
        more += [notes[row]] if len(notes) else []
        rows.append(_Row(_Cell(images, int(query), QUERY), cells, more))
    return _sheet(rows, found.shape[1], legend)


def contact_sheet(
    queries: ImageSet, found: np.ndarray, notes: np.ndarray, gallery: ImageSet
) -> Image.Image:
    """One row per query: its name, the query, what was found, with a note and its names below each.

    Args:
        queries: any images, named by their classes; nothing is known to be right or wrong.
        found: (Q, top) indices into the gallery. notes: (Q, top) short texts, such as cosines.
    """
    rows = [
        _Row(
            _Cell(queries, row, QUERY),
            [
                _Cell(gallery, int(n), QUERY, _about(gallery, int(n), str(note)))
                for n, note in zip(neighbours, texts, strict=True)
            ],
            [],
        )
        for row, (neighbours, texts) in enumerate(zip(found, notes, strict=True))
    ]
    return _sheet(rows, found.shape[1], None)


class _Cell(NamedTuple):
    """A picture in a coloured frame, with texts below it: a note, a class and a file."""

    images: ImageSet
    index: int
    colour: tuple[int, int, int]
    text: tuple[str, str, str] | None = None


class _Row(NamedTuple):
    """A query with what it finds; `more` is written below the name of the query."""

    query: _Cell
    found: list[_Cell]
    more: list[str]


def _about(images: ImageSet, index: int, note: str) -> tuple[str, str, str]:
    return note, images.class_names[images.labels[index]], images.paths[index]


def _sheet(rows: Sequence[_Row], columns: int, legend: Image.Image | None) -> Image.Image:
    """Draws rows of pictures; they are wider, with room for names, if texts are below them."""
    named = any(cell.text is not None for row in rows for cell in row.found)
    side, name = (NAMED_CELL, NAMED_NAME) if named else (CELL, NAME)
    step = side + GAP + (NOTE.line + NAME_LINES * SMALL.line + SMALL.line + GAP if named else 0)
    first = EDGE + name + side + AFTER_QUERY
    width = first + columns * (side + GAP) - GAP + EDGE
    top = EDGE
    if legend is not None:
        width, top = max(width, legend.width + 2 * EDGE), LEGEND
    height = top + len(rows) * step - GAP + EDGE
    canvas = blank((width, height), len(rows), columns)
    if legend is not None:
        canvas.paste(legend, (EDGE, EDGE))
    for row in rows:
        _write_query(canvas, (EDGE, top), row, name - GAP - EDGE, side)
        canvas.paste(_framed(*row.query[:3], side), (EDGE + name, top))
        for column, cell in enumerate(row.found):
            left = first + column * (side + GAP)
            canvas.paste(_framed(*cell[:3], side), (left, top))
            if cell.text is not None:
                _write_below(canvas, (left, top + side + 2), cell.text, side)
        top += step
    return canvas


def blank(size: tuple[int, int], queries: int, found: int) -> Image.Image:
    """A white picture of this size; queries and found are for the error.

    Raises:
        InputError: it would have more than `MOST_PIXELS`.
    """
    width, height = size
    if width * height > MOST_PIXELS:
        raise InputError(
            f"a picture of {queries:,} queries with {found} images each has {width:,} × "
            f"{height:,} pixels, more than most programs open; choose fewer of either"
        )
    return Image.new("RGB", size, PAPER)


def _write_query(
    canvas: Image.Image, corner: tuple[int, int], row: _Row, width: int, side: int
) -> None:
    """Writes the class of a query in the middle of its row, and further texts in small letters."""
    images, index = row.query.images, row.query.index
    name = images.class_names[images.labels[index]]
    lines = [(NOTE, line) for line in NOTE.wrapped(name, width, MOST_LINES)]
    for place, words in enumerate(row.more):
        file = place == 0 and words == images.paths[index]
        small = [SMALL.end_of(words, width)] if file else SMALL.wrapped(words, width, MOST_LINES)
        lines += [(SMALL, line) for line in small]
    left, top = corner[0], corner[1] + max(0, side - sum(font.line for font, _ in lines)) // 2
    for font, line in lines:
        font.draw(canvas, (left, top), line, INK)
        top += font.line


def _write_below(
    canvas: Image.Image, corner: tuple[int, int], text: tuple[str, str, str], width: int
) -> None:
    """Writes a note, a class in a few lines, and the end of a file's name below a picture."""
    note, name, file = text
    left, top = corner
    lines = [(NOTE, note, INK)]
    lines += [(SMALL, line, INK) for line in SMALL.wrapped(name, width, NAME_LINES)]
    lines.append((SMALL, SMALL.end_of(file, width), FAINT))
    for font, line, ink in lines:
        font.draw(canvas, (left, top), line, ink)
        top += font.line


def class_values_picture(
    value: str, values: np.ndarray, train: ImageSet, shown: int = 10
) -> Image.Image:
    """A picture of the value learned for each class: all by rank, and the classes at both ends.

    Args:
        value: its name, such as margin. values: (C,), one for each class of `train`.
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
        _write_name(canvas, top, name)
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
    """Draws ascending values as a line in a box, with the lowest and the highest beside it."""
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
    write_content(path, buffer.getvalue())


def _framed(
    images: ImageSet, index: int, colour: tuple[int, int, int], side: int = CELL
) -> Image.Image:
    """The image, whole and in its proportions, in a cell with a frame of this colour."""
    inside = side - 2 * (max(WIDTH_OF.values()) + 1)
    picture = _picture(images, int(index))
    scale = inside / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    cell = Image.new("RGB", (side, side), PAPER)
    corner = tuple((side - length) // 2 for length in size)
    cell.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
    box = (0, 0, side - 1, side - 1)
    ImageDraw.Draw(cell).rectangle(box, outline=colour, width=WIDTH_OF[colour])
    return cell


def _picture(images: ImageSet, index: int) -> Image.Image:
    """The image; a grey square if it can no longer be read."""
    try:
        return Image.fromarray(images.read(index))
    except OSError:
        return Image.new("RGB", (CELL, CELL), QUERY)


def _legend(caption: str) -> Image.Image:
    """One line: the caption, how to read a row, and what the two frames mean."""
    parts = [
        (f"{caption}. " if caption else "") + "Nearest images, left to right:",
        *(RIGHT, "same class"),
        *(WRONG, "another class"),
    ]
    canvas, left = Image.new("RGB", (2000, LINE), PAPER), 0
    for part in parts:
        if isinstance(part, str):
            NOTE.draw(canvas, (left, 0), part, INK)
            left += round(NOTE.length(part)) + 10
        else:
            box = (left, 1, left + LINE - 3, LINE - 2)
            ImageDraw.Draw(canvas).rectangle(box, outline=part, width=WIDTH_OF[part])
            left += LINE + 3
    return canvas.crop((0, 0, left - 10, LINE))


def _write_name(canvas: Image.Image, top: int, name: str) -> None:
    lines = NOTE.wrapped(name, NAME - GAP - EDGE, MOST_LINES)
    corner = (EDGE, top + (CELL - LINE * len(lines)) // 2)
    for number, line in enumerate(lines):
        NOTE.draw(canvas, (corner[0], corner[1] + number * LINE), line, INK)
