"""A run made visible: for now, queries and what the network finds nearest to them.

The queries are drawn at random, so a picture shows a network as it is, failures included.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dataset.base import ImageSet
from utils import write_atomically

# 900 pixels wide with ten neighbours: a README shows it pixel by pixel.
EDGE, NAME, CELL, GAP, AFTER_QUERY, LEGEND = 8, 114, 66, 4, 14, 30
RIGHT, WRONG, QUERY = (26, 127, 55), (207, 34, 46), (175, 184, 193)
# A right frame is also the wider one, for readers who do not tell green from red.
WIDTH_OF = {RIGHT: 4, WRONG: 2, QUERY: 1}
INK, PAPER = (31, 35, 40), (255, 255, 255)
FONT_SIZE, LINE, MOST_LINES, LONGEST_NAME = 13, 16, 3, 200


def random_queries(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """One random image of each of `count` random classes: chosen by the seed, not by the result."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(labels))[:count]
    return np.array([rng.choice(np.flatnonzero(labels == label)) for label in classes])


def nearest(
    queries: torch.Tensor, gallery: torch.Tensor, own: np.ndarray | None, top: int
) -> np.ndarray:
    """Indices of the gallery images nearest to each query by cosine, nearest first.

    Args:
        queries: (Q, d). gallery: (G, d). own: (Q,) the queries' own places in the gallery, which
            are left out; None where they are not in it.

    Returns:
        (Q, top); fewer columns where the gallery has fewer images.
    """
    unit = torch.nn.functional.normalize
    similarity = unit(queries.float(), dim=1) @ unit(gallery.float(), dim=1).T
    others = similarity.shape[1]
    if own is not None:
        similarity[torch.arange(len(own)), torch.from_numpy(own)] = -torch.inf
        others -= 1
    return similarity.topk(min(top, others)).indices.cpu().numpy()


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
    picture = Image.fromarray(images.read(int(index)))
    scale = inside / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    corner = tuple((CELL - side) // 2 for side in size)
    cell.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
    box = (0, 0, CELL - 1, CELL - 1)
    ImageDraw.Draw(cell).rectangle(box, outline=colour, width=WIDTH_OF[colour])
    return cell


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
    text = "".join(c if c.isprintable() else "?" for c in text)
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
