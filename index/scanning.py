"""Search by comparing queries with all images, by cosine, with reproducible order and scores.

The rounding of a matrix product depends on the number of queries, so equal images could change
places from one call to the next. Therefore products (or codes) only choose candidates. These are
scored one by one in float64, and of equal scores the lower number comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from index.codes import CODINGS, Coded, tensor_of

QUERIES = 64  # queries that are compared at once
WIDTH = 1 << 18  # images whose scores are in memory at once: 64 MB for 64 queries
TILE = 1 << 13  # images that are multiplied at once
SPARE = 16  # additional candidates, so that rounding does not decide which are found
ROUNDING = 4e-6  # the largest error of a float32 product of unit vectors


class Hits(NamedTuple):
    """The result of a search.

    Attributes:
        rows: (Q, top) int64, nearest first; filled up with -1 if the index holds fewer images.
        scores: (Q, top) float32, cosines; filled up with -inf.
    """

    rows: np.ndarray
    scores: np.ndarray


class Block(NamedTuple):
    """Consecutive images.

    Attributes:
        first: the number of the first. vectors: (n, d) unit vectors, perhaps mapped from a file.
        live: (n,) bool, False for removed images; None if none were removed.
        coded: their codes, if there are any.
        rows: reads some of the vectors from a file; None: they are taken from `vectors`.
    """

    first: int
    vectors: np.ndarray
    live: np.ndarray | None = None
    coded: Coded | None = None
    rows: Callable[[np.ndarray], np.ndarray] | None = None

    def taken(self, places: np.ndarray) -> np.ndarray:
        """(m, d) the vectors at some places."""
        return self.vectors[places] if self.rows is None else self.rows(places)


Compare = Callable[[np.ndarray, Block, slice], torch.Tensor]
"""Queries (Q, d) and a part of a block → scores (Q, n), larger is nearer."""


def by_product(queries: np.ndarray, block: Block, part: slice) -> torch.Tensor:
    """Cosines."""
    return torch.from_numpy(queries) @ tensor_of(block.vectors[part]).T


# --- the searches ---------------------------------------------------------------------------------


def exact(blocks: Sequence[Block], queries: np.ndarray, top: int) -> Hits:
    """The images whose vectors have the largest cosines with each query.

    Args:
        queries: (Q, d) float32, unit length.
    """
    found = []
    for some in _batches(queries):
        scores, numbers = _best(blocks, some, top + SPARE, by_product)
        for query, near, candidates in zip(some, scores, numbers, strict=True):
            if len(near) == top + SPARE and near[-1] > near[top - 1] - ROUNDING:
                # There may be further images as near as these: many copies of one picture.
                candidates = above(blocks, query, near[top - 1] - ROUNDING)
            found.append(rescored(blocks, query, candidates[candidates >= 0], top))
    return joined(found, top)


def nearest(blocks: Sequence[Block], queries: np.ndarray, count: int) -> np.ndarray:
    """(Q, ≤ count) numbers of the images with the largest cosines, up to rounding."""
    return _best(blocks, queries, count, by_product)[1]


def coded(
    blocks: Sequence[Block], queries: np.ndarray, top: int, name: str, centre: np.ndarray
) -> Hits:
    """The nearest of the candidates that codes of the kind `name` choose, scored exactly."""
    coding, found = CODINGS[name], []

    def compare(some: np.ndarray, block: Block, part: slice) -> torch.Tensor:
        return coding.compare(some, block.coded, part, centre)

    for some in _batches(queries):
        _, numbers = _best(blocks, some, max(coding.depth * top, coding.least), compare)
        for query, candidates in zip(some, numbers, strict=True):
            found.append(rescored(blocks, query, candidates[candidates >= 0], top))
    return joined(found, top)


def joined(found: Sequence[tuple[np.ndarray, np.ndarray]], top: int) -> Hits:
    """Joins the hits of each query."""
    if not found:
        return Hits(np.empty((0, top), np.int64), np.empty((0, top), np.float32))
    return Hits(*(np.stack(arrays) for arrays in zip(*found, strict=True)))


def _batches(queries: np.ndarray) -> Iterator[np.ndarray]:
    return (queries[start : start + QUERIES] for start in range(0, len(queries), QUERIES))


# --- candidates -----------------------------------------------------------------------------------


def _best(
    blocks: Sequence[Block], queries: np.ndarray, count: int, compare: Compare
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` best scores of each query (Q, ≤ count), and the images' numbers; -1 for none."""
    scores = torch.empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64)
    for first, found in _scores(blocks, queries, compare):
        best = found.topk(min(count, found.shape[1]))
        scores = torch.cat([scores, best.values], 1)
        numbers = torch.cat([numbers, best.indices + first], 1)
        scores, order = scores.topk(min(count, scores.shape[1]))
        numbers = numbers.gather(1, order)
    numbers[scores == -torch.inf] = -1
    return scores.numpy(), numbers.numpy()


def _scores(
    blocks: Sequence[Block], queries: np.ndarray, compare: Compare
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (number of the first image, scores (Q, n)) for parts of consecutive blocks.

    Removed images have -inf. Each tensor is overwritten by the next one.
    """
    total = sum(len(block.vectors) for block in blocks)
    found = torch.empty(len(queries), min(WIDTH, total))
    first, filled = blocks[0].first if blocks else 0, 0
    for block in blocks:
        for part in parts_of(len(block.vectors), TILE):
            if filled + part.stop - part.start > found.shape[1]:
                yield first, found[:, :filled]
                first, filled = first + filled, 0
            tile = found[:, filled : filled + part.stop - part.start]
            tile.copy_(compare(queries, block, part))
            if block.live is not None:
                tile[:, ~torch.from_numpy(block.live[part])] = -torch.inf
            filled += part.stop - part.start
    if filled:
        yield first, found[:, :filled]


def parts_of(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(count)`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def above(blocks: Sequence[Block], query: np.ndarray, least: float) -> np.ndarray:
    """The numbers of all images whose cosine with a query (d,) is at least `least`."""
    found = [
        first + (scores[0] >= least).nonzero()[:, 0]
        for first, scores in _scores(blocks, query[None], by_product)
    ]
    return torch.cat(found).numpy() if found else np.empty(0, np.int64)


# --- exact scores ---------------------------------------------------------------------------------


def as_cosines(products: np.ndarray) -> np.ndarray:
    """Products of unit vectors, clipped to -1..1, which rounding may exceed."""
    return products.clip(-1, 1)


def rescored(
    blocks: Sequence[Block], query: np.ndarray, candidates: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` nearest of some candidates: (top,) numbers and exact cosines, padded as `Hits`."""
    candidates = np.sort(candidates)
    # Not with @, whose rounding depends on the place of a vector.
    parts = [
        np.einsum("nd,d->n", vectors, query.astype(np.float64))
        for vectors in _taken(blocks, candidates)
    ]
    scores = np.concatenate([*parts, np.empty(0)]).astype(np.float32)
    order = np.argsort(-scores, kind="stable")[:top]
    numbers = np.full(top, -1, np.int64)
    cosines = np.full(top, -np.inf, np.float32)
    numbers[: len(order)], cosines[: len(order)] = candidates[order], as_cosines(scores[order])
    return numbers, cosines


def _taken(blocks: Sequence[Block], numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the vectors of images with ascending numbers, in float64, in parts."""
    firsts = [block.first for block in blocks]
    owners = np.searchsorted(firsts, numbers, side="right") - 1
    for owner in np.unique(owners):
        own = numbers[owners == owner] - firsts[owner]
        for start in range(0, len(own), TILE):
            yield blocks[owner].taken(own[start : start + TILE]).astype(np.float64)
