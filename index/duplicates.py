"""Images of an index that are so near to each other that they may be the same."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from evaluation.embedding import progress_bar
from index.codes import tensor_of
from index.gallery import Index
from index.scanning import ROUNDING, TILE, as_cosines, parts_of
from utils import InputError

MOST_PAIRS = 1_000_000
ROWS = 1024  # images whose cosines with the others are in memory at once
SLACK = 1e-6
"""Tolerance below the least cosine.

In float32, unit length holds within 1e-7, so the cosine of a vector with itself is not exactly 1;
and the last digits of an embedding depend on the other images of its batch.
"""


class Pairs(NamedTuple):
    """Pairs of images, the nearest first: rows of both (P,), and their cosines (P,)."""

    first: np.ndarray
    second: np.ndarray
    cosines: np.ndarray

    def groups(self, count: int) -> list[list[int]]:
        """Connected groups of rows, of `count` rows: the largest group first, then by row."""
        edges = coo_array((np.ones(len(self.first)), (self.first, self.second)), (count, count))
        _, group = connected_components(edges, directed=False)
        members: dict[int, list[int]] = {}
        for row in np.unique(np.concatenate([self.first, self.second])).tolist():
            members.setdefault(int(group[row]), []).append(row)
        return sorted(members.values(), key=lambda rows: (-len(rows), rows))


def pairs_above(index: Index, least: float) -> Pairs:
    """All pairs of images with a cosine of at least `least`, found by comparing all with all.

    Raises:
        InputError: there are more than a million.
    """
    found, count = [(*np.empty((2, 0), np.int64), np.empty(0, np.float32))], 0
    tiles = list(parts_of(len(index), TILE))
    steps, done = len(tiles) * (len(tiles) + 1) / 2, 0
    with progress_bar("comparing") as progress:
        for place, own in enumerate(tiles):
            some = index.rows(own)
            for other in tiles[place:]:
                others = index.rows(other)
                for part in parts_of(len(some), ROWS):
                    pairs = _above(some[part], others, least)
                    rows = (own.start + part.start + pairs[0], other.start + pairs[1])
                    ahead = rows[0] < rows[1]
                    found.append([array[ahead] for array in (*rows, pairs[2])])
                    count += int(ahead.sum())
                    if count > MOST_PAIRS:
                        raise InputError(
                            f"more than {MOST_PAIRS:,} pairs have a cosine of {least:g} or more; "
                            "raise --above"
                        )
                done += 1
                progress(done / steps)
    first, second, cosines = map(np.concatenate, zip(*found, strict=True))
    order = np.lexsort((second, first, -cosines))
    return Pairs(first[order], second[order], cosines[order])


def _above(
    some: np.ndarray, others: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs with a cosine of at least `least` - `SLACK`: places in both arrays, and cosines."""
    least -= SLACK
    product = tensor_of(some) @ tensor_of(others).T
    first, second = (product >= least - ROUNDING).nonzero(as_tuple=True)
    first, second = first.numpy(), second.numpy()
    parts = [
        np.einsum("nd,nd->n", some[first[p]].astype(np.float64), others[second[p]])
        for p in parts_of(len(first), TILE)
    ]
    cosines = as_cosines(np.concatenate([*parts, np.empty(0)])).astype(np.float32)
    enough = cosines >= np.float32(least)
    return first[enough], second[enough], cosines[enough]
