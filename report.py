"""A run made visible: for now, queries and what the network finds nearest to them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dataset.base import ImageSet
from utils import write_atomically

THUMB, GAP, FRAME, NAME_WIDTH = 72, 6, 3, 150
RIGHT, WRONG, INK = (34, 139, 72), (206, 44, 44), (40, 40, 40)


def random_queries(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """One random image of each of `count` random classes: chosen by the seed, not by the result."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(labels))[:count]
    return np.array([rng.choice(np.flatnonzero(labels == label)) for label in classes])


def nearest(
    queries: torch.Tensor, gallery: torch.Tensor, own: np.ndarray | None, top: int
) -> np.ndarray:
    """Indices (Q, top) of the gallery images nearest to each query by cosine, nearest first.

    Args:
        queries: (Q, d). gallery: (G, d). own: (Q,) the queries' own places in the gallery, which
            are left out; None where they are not in it.
    """
    unit = torch.nn.functional.normalize
    similarity = unit(queries.float(), dim=1) @ unit(gallery.float(), dim=1).T
    if own is not None:
        similarity[torch.arange(len(own)), torch.from_numpy(own)] = -torch.inf
    return similarity.topk(min(top, similarity.shape[1])).indices.cpu().numpy()


def neighbours_picture(
    images: ImageSet,
    queries: np.ndarray,
    found: np.ndarray,
    gallery: ImageSet | None = None,
) -> Image.Image:
    """A row a query: its class, the query, and what was found, framed green or red.

    Args:
        images: where the queries are from. queries: (Q,) indices. found: (Q, top) indices into the
            gallery, or into `images` where there is no gallery.
    """
    gallery = gallery or images
    step = THUMB + GAP
    width = NAME_WIDTH + step * (found.shape[1] + 1) + 2 * GAP
    canvas = Image.new("RGB", (width, step * len(queries) + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for row, (query, neighbours) in enumerate(zip(queries, found, strict=True)):
        top = GAP + row * step
        label = images.class_names[images.labels[query]]
        lines = _wrapped(label, font, NAME_WIDTH - 2 * GAP)[:3]
        height = 16 * len(lines)
        draw.multiline_text((GAP, top + (THUMB - height) / 2), "\n".join(lines), INK, font=font)
        canvas.paste(_thumbnail(images, query), (NAME_WIDTH, top))
        for column, neighbour in enumerate(neighbours):
            left = NAME_WIDTH + GAP + (column + 1) * step
            right = gallery.labels[neighbour] == images.labels[query]
            canvas.paste(_thumbnail(gallery, neighbour), (left, top))
            box = (left, top, left + THUMB - 1, top + THUMB - 1)
            draw.rectangle(box, outline=RIGHT if right else WRONG, width=FRAME)
    return canvas


def _thumbnail(images: ImageSet, index: int) -> Image.Image:
    picture = Image.fromarray(images.read(int(index)))
    inside = THUMB - 2 * FRAME
    scale = inside / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    square = Image.new("RGB", (THUMB, THUMB), "white")
    corner = tuple((THUMB - side) // 2 for side in size)
    square.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
    return square


def _wrapped(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
