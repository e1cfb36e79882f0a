"""Near duplicates: the same picture again, in another size, recompressed, cropped or brighter.

They are found between two lists of images by their thumbnails of 32 x 32 pixels, in two steps:

1. A perceptual hash: whether each of the 63 lowest frequencies of the thumbnail's luminance is
   above their median (a cosine transform, as in Zauner, "Implementation and Benchmarking of
   Perceptual Image Hash Functions", 2010). The candidates for an image of one list are the few
   images of the other whose hashes differ from its own in the fewest bits.
2. Each pair of candidates is registered by the shift and scale along both axes, and the contrast
   and brightness, that best map one thumbnail onto the other (Gauss-Newton on the squared
   difference, as in Lucas and Kanade, 1981). A pair are near duplicates if hardly any difference
   remains anywhere.

The hash alone cannot tell drawings on white from each other; the remaining difference can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 32  # pixels of a thumbnail
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_LOW = 8  # frequencies along each axis
BITS = 18  # candidates differ in at most so many bits of 63
_CANDIDATES = 4  # for each image
_COARSE, _SIMILAR = 8, 0.8  # side of coarser thumbnails, and the correlation that they must have
_ROUNDS, _STEP = 8, 0.1  # of the registration, and the largest change in each
_MOVED = 0.25  # the most that pictures may be scaled or shifted (2 is a whole side)
_CONTRAST = (0.5, 2.0)
_BLOCK = 4  # pixels
# The difference that may remain, as a share of the contrast: overall, and in the worst block. Of
# 300 photographs cropped by up to 5 % on each side, halved, brightened by a fifth and saved at
# quality 50, 99 % are below 0.21 and 0.56; of the same photographs only brightened, which clips
# white, 99 % are below 0.24 and 0.62.
_REMAINS, _REMAINS_ANYWHERE = 0.22, 0.5
_FLAT = 4.0  # levels of 255: thumbnails that vary less show nothing
_AT_ONCE = 256
REGISTERED = 40_000  # pairs at most: a minute on one core


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 → (32, 32, 3) uint8: the whole picture, stretched to a square."""
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(small)


class Pair(NamedTuple):
    """Indices in the two lists, and the remaining difference as a share of the contrast."""

    first: int
    second: int
    remains: float


def near_duplicates(
    first: np.ndarray, second: np.ndarray, progress: Callable[[int], None] | None = None
) -> list[Pair]:
    """Near duplicates between two lists of images, the most similar pairs first.

    Args:
        first, second: thumbnails (N, 32, 32, 3) and (M, 32, 32, 3).
        progress: called with the work done as a number of images of `first`.

    Returns:
        The most similar near duplicate in `second` of each image of `first` that has one.
    """
    if not len(first) or not len(second):
        return []
    found: dict[int, Pair] = {}
    rows, columns = _candidates(hashes(first), hashes(second), progress)
    alike = _correlations(first, rows, second, columns)
    order = np.argsort(-alike, kind="stable")[:REGISTERED]
    order = order[alike[order] >= _SIMILAR]
    rows, columns = rows[order], columns[order]
    for part in _parts(len(rows), _AT_ONCE):
        remains = _what_remains(first[rows[part]], second[columns[part]])
        if progress is not None:  # the second half of the work
            progress(len(first) * (len(rows) + part.stop) // (2 * len(rows)))
        for row, column, rest in zip(rows[part], columns[part], remains, strict=True):
            if np.isfinite(rest) and (row not in found or rest < found[row].remains):
                found[row] = Pair(int(row), int(column), float(rest))
    return sorted(found.values(), key=lambda pair: pair.remains)


# --- the hash -------------------------------------------------------------------------------------


def _cosines() -> np.ndarray:
    """(8, 32): the lowest frequencies of the cosine transform (DCT-II)."""
    places, frequencies = np.arange(SIDE) + 0.5, np.arange(_LOW)
    return np.cos(np.pi / SIDE * frequencies[:, None] * places).astype(np.float32)


def hashes(thumbnails: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) → (N,) uint64; the hashes of similar pictures differ in few bits."""
    basis = _cosines()
    found = [np.empty(0, np.uint64)]
    for part in _parts(len(thumbnails), 4096):
        grey = thumbnails[part].astype(np.float32) @ _LUMINANCE
        low = (basis @ grey @ basis.T).reshape(-1, _LOW * _LOW)[:, 1:]  # without the mean
        bits = low > np.median(low, axis=1, keepdims=True)
        padded = np.concatenate([np.zeros((len(bits), 1), bool), bits], axis=1)
        found.append(np.packbits(padded, axis=1).view(">u8")[:, 0].astype(np.uint64))
    return np.concatenate(found)


def _candidates(
    first: np.ndarray, second: np.ndarray, progress: Callable[[int], None] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices in both lists of the candidate pairs."""
    rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    # Row by row, which is ten times as fast because a row fits the processor's cache.
    bits, different = np.empty_like(second), np.empty(len(second), np.uint8)
    for row, value in enumerate(first):
        _count_bits(np.bitwise_xor(value, second, out=bits), different)
        near = np.flatnonzero(different <= BITS)
        if len(near) > _CANDIDATES:
            near = near[np.argpartition(different[near], _CANDIDATES - 1)[:_CANDIDATES]]
        rows.append(np.full(len(near), row))
        columns.append(near)
        if progress is not None and row % 256 == 0:
            progress(row // 2)
    return np.concatenate(rows), np.concatenate(columns)


def _count_bits(values: np.ndarray, out: np.ndarray) -> None:
    """Write the number of set bits of each uint64 to `out`."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        np.bitwise_count(values, out=out)
    else:
        out[:] = np.unpackbits(values.view(np.uint8)).reshape(-1, 64).sum(axis=1)


def _correlations(
    first: np.ndarray, rows: np.ndarray, second: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Correlations of the candidates at 8 x 8 pixels, which rule out most of them."""
    found = [np.empty(0, np.float32)]
    for part in _parts(len(rows), 4096):
        product = _coarse(first[rows[part]]) * _coarse(second[columns[part]])
        found.append(product.sum(axis=1))
    return np.concatenate(found)


def _coarse(thumbnails: np.ndarray) -> np.ndarray:
    """(n, 192) thumbnails at 8 x 8 pixels, with mean 0 and length 1."""
    cell = SIDE // _COARSE
    blocks = thumbnails.reshape(-1, _COARSE, cell, _COARSE, cell, 3)
    small = blocks.mean(axis=(2, 4), dtype=np.float32).reshape(len(thumbnails), -1)
    small -= small.mean(axis=1, keepdims=True)
    return small / (np.linalg.norm(small, axis=1, keepdims=True) + 1e-6)


def _parts(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(total, start + size)) for start in range(0, total, size))


# --- registration ---------------------------------------------------------------------------------


def _what_remains(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) the difference of pairs of thumbnails that remains after registration; inf: too much."""
    still, moved = _smooth(first), _smooth(second)
    where = _registered(still @ _LUMINANCE, moved @ _LUMINANCE)
    warped, inside = _warped(moved, where), _inside(where)[..., None]
    light = _light(still, warped, inside)
    rest = (light[:, 0, None, None, None] * warped + light[:, 1, None, None, None]) - still
    squares = (rest**2 * inside).mean(axis=3)
    contrast = still.std(axis=(1, 2, 3)) + 1e-6
    over_all = np.sqrt(squares.sum(axis=(1, 2)) / (inside.sum(axis=(1, 2, 3)) + 1e-6)) / contrast
    n, blocks = len(rest), SIDE // _BLOCK
    worst = squares.reshape(n, blocks, _BLOCK, blocks, _BLOCK).mean(axis=(2, 4)).max(axis=(1, 2))
    beyond = np.abs(where - _AS_IT_IS).max(axis=1) > _MOVED
    low, high = _CONTRAST
    same = (over_all <= _REMAINS) & (np.sqrt(worst) / contrast <= _REMAINS_ANYWHERE) & ~beyond
    same &= (light[:, 0] >= low) & (light[:, 0] <= high)
    same &= np.minimum(_varies(still), _varies(moved)) >= _FLAT
    return np.where(same, over_all, np.inf)


def _varies(images: np.ndarray) -> np.ndarray:
    """(n,) the standard deviation of the channel that varies most; 0 for a plain colour."""
    return images.std(axis=(1, 2)).max(axis=1)


def _smooth(images: np.ndarray) -> np.ndarray:
    """Images (n, 32, 32, 3) without the finest detail, which every crop changes."""
    images = images.astype(np.float32)
    for axis in (1, 2):
        ends = [(1, 1) if each == axis else (0, 0) for each in range(4)]
        padded = np.pad(images, ends, mode="edge")
        a, b, c = (padded.take(range(k, k + SIDE), axis) for k in range(3))
        images = (a + 2 * b + c) / 4
    return images


# A sampling position: y → scale · y + shift, from the picture's centre, and x likewise.
_AS_IT_IS = np.array([1, 0, 1, 0], np.float32)
_AXIS = np.linspace(-1, 1, SIDE, dtype=np.float32)


def _registered(still: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """(n, 4) the sampling positions at which each grey picture is most similar to the other."""
    where = np.tile(_AS_IT_IS, (len(still), 1))
    y, x = _AXIS[None, :, None], _AXIS[None, None, :]
    down, right = np.gradient(moved, 2 / (SIDE - 1), axis=(1, 2))
    for _ in range(_ROUNDS):
        inside = _inside(where)
        warped, slope_y, slope_x = (_warped(each, where) for each in (moved, down, right))
        gain, offset = _light(still, warped, inside).T[:, :, None, None]
        rest = (gain * warped + offset - still) * inside
        slope_y, slope_x = slope_y * gain * inside, slope_x * gain * inside
        slopes = np.stack([slope_y * y, slope_y, slope_x * x, slope_x], axis=1)
        slopes = slopes.reshape(len(still), 4, -1)
        square = slopes @ slopes.transpose(0, 2, 1)
        damping = 1e-4 * np.trace(square, axis1=1, axis2=2)[:, None, None] + 1e-3
        square += damping * np.eye(4, dtype=np.float32)
        change = np.linalg.solve(square, slopes @ rest.reshape(len(still), -1, 1))[:, :, 0]
        where -= change.clip(-_STEP, _STEP)
    return where


def _inside(where: np.ndarray) -> np.ndarray:
    """(n, 32, 32) 1 where the sampling position is inside the picture, 0 elsewhere."""
    y, x = _places(where)
    return ((np.abs(y) <= 1)[:, :, None] & (np.abs(x) <= 1)[:, None, :]).astype(np.float32)


def _places(where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sampled y and x, from -1 to 1 in the picture, (n, 32) each."""
    scale_y, shift_y, scale_x, shift_x = where.T[:, :, None]
    return scale_y * _AXIS + shift_y, scale_x * _AXIS + shift_x


def _warped(images: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Images (n, 32, 32, …) sampled at other positions, with linear interpolation."""
    down, across = (_interpolation(at)[:, None] for at in _places(where))
    colours = images.reshape(len(images), SIDE, SIDE, -1).transpose(0, 3, 1, 2)
    warped = down @ colours @ across.transpose(0, 1, 3, 2)
    return warped.transpose(0, 2, 3, 1).reshape(images.shape)


def _interpolation(places: np.ndarray) -> np.ndarray:
    """(n, 32) positions from -1 to 1 → (n, 32, 32) the weights of the pixels for each of them."""
    pixels = (places.clip(-1, 1) + 1) / 2 * (SIDE - 1)
    distance = np.abs(pixels[:, :, None] - np.arange(SIDE, dtype=np.float32))
    return np.maximum(0, 1 - distance)


def _light(still: np.ndarray, warped: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(n, 2) the contrast and brightness that make one picture most similar to the other."""
    axes = tuple(range(1, still.ndim))
    spread = (len(still), *[1] * len(axes))
    total = (inside * np.ones_like(still)).sum(axis=axes) + 1e-6
    mean_w, mean_s = ((side * inside).sum(axis=axes) / total for side in (warped, still))
    about_w, about_s = warped - mean_w.reshape(spread), still - mean_s.reshape(spread)
    weighted = about_w * inside
    gain = (weighted * about_s).sum(axis=axes) / ((weighted * about_w).sum(axis=axes) + 1e-6)
    return np.stack([gain, mean_s - gain * mean_w], axis=1)
