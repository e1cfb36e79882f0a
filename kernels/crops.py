"""Views of images in a GPU's memory: cut out, mirrored and resized in one pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weight(distance, CUBIC: tl.constexpr):
    """The antialiasing filter of Pillow and torch: a triangle, or Keys' cubic with slope -0.5."""
    x = tl.abs(distance)
    if CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        value = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    else:
        value = tl.where(x < 1, 1 - x, 0.0)
    return value


@triton.jit
def cut(
    pixels, places, boxes, out, size, taps,
    CUBIC: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One line of one view, size × size pixels of 3 colours.

    Args:
        pixels: (P, 3) uint8, all images row by row. out: (B, size, size, 3) float32.
        places: (B, 7) int64 for each view: the number of its image's first pixel, the image's
            width, the first row and column that may be used, how many of each, whether it is
            mirrored. boxes: (B, 4) float32: its first row and column, counted from those, and its
            height and width, in pixels of the image.
        taps: the most pixels in a row or column that have a weight.
        TAPS, COLUMNS: powers of two, at least `taps` and `size`.
    """
    image, line = tl.program_id(0) // size, tl.program_id(0) % size
    origin = tl.load(places + image * 7)
    width = tl.load(places + image * 7 + 1)
    origin += tl.load(places + image * 7 + 2) * width + tl.load(places + image * 7 + 3)
    rows = tl.load(places + image * 7 + 4)
    columns = tl.load(places + image * 7 + 5)
    mirrored = tl.load(places + image * 7 + 6)

    down = tl.load(boxes + image * 4 + 2) / size
    y = tl.load(boxes + image * 4) + (line + 0.5) * down
    row = tl.floor(y - taps / 2.0).to(tl.int64) + tl.arange(0, TAPS)
    exists = (row >= 0) & (row < rows) & (tl.arange(0, TAPS) < taps)
    of_row = tl.where(exists, _weight((row + 0.5 - y) / tl.maximum(down, 1.0), CUBIC), 0.0)
    first = (origin + row * width)[:, None]

    across = tl.load(boxes + image * 4 + 3) / size
    column = tl.arange(0, COLUMNS)
    x = tl.where(mirrored != 0, size - (column + 0.5), column + 0.5) * across
    x += tl.load(boxes + image * 4 + 1)
    left = tl.floor(x - taps / 2.0).to(tl.int64)

    red = tl.zeros([COLUMNS], tl.float32)
    green = tl.zeros([COLUMNS], tl.float32)
    blue = tl.zeros([COLUMNS], tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for tap in range(taps):
        at = left + tap
        inside = (at >= 0) & (at < columns) & (column < size)
        of_column = _weight((at + 0.5 - x) / tl.maximum(across, 1.0), CUBIC)
        of_column = tl.where(inside, of_column, 0.0)
        total += of_column
        weight = of_row[:, None] * of_column[None, :]
        here = exists[:, None] & inside[None, :]
        pixel = pixels + (first + at[None, :]) * 3
        red += tl.sum(weight * tl.load(pixel, mask=here, other=0).to(tl.float32), axis=0)
        green += tl.sum(weight * tl.load(pixel + 1, mask=here, other=0).to(tl.float32), axis=0)
        blue += tl.sum(weight * tl.load(pixel + 2, mask=here, other=0).to(tl.float32), axis=0)
    whole = tl.where(column < size, total * tl.sum(of_row, axis=0), 1.0)
    at = out + (tl.program_id(0).to(tl.int64) * size + column) * 3
    tl.store(at, red / whole, mask=column < size)
    tl.store(at + 1, green / whole, mask=column < size)
    tl.store(at + 2, blue / whole, mask=column < size)
