"""All embeddings of a gallery against some queries, by cosine, in an order that is always the same.

A product of matrices adds up in an order that depends on how many queries there are, so equal
images could change places from one call to the next. Products therefore only choose candidates;
their scores are computed one by one in float64, and of equal ones the first row comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

AT_ONCE = 1 << 26  # scores in memory: 256 MB
QUERIES = 256
SPARE = 16  # candidates beyond those asked for, so that rounding decides nothing
ROUNDING = 4e-6  # how far a float32 product of unit vectors may be off


class Hits(NamedTuple):
    """What was found.

    Attributes:
        rows: (Q, top) int64, nearest first; -1 where the index holds fewer images.
        scores: (Q, top) float32, cosines; -inf there.
    """

    rows: np.ndarray
    scores: np.ndarray


class Block(NamedTuple):
    """Neighbouring rows: the first one's number, their unit vectors (n, d), and which count."""

    first: int
    vectors: np.ndarray
    live: np.ndarray | None


def exact(blocks: Sequence[Block], queries: np.ndarray, top: int) -> Hits:
    """The rows whose vectors have the largest cosines with each query.

    Args:
        queries: (Q, d) float32, unit length.
    """
    parts = [
        _exact(blocks, queries[start : start + QUERIES], top)
        for start in range(0, len(queries), QUERIES)
    ]
    return joined(parts, top)


def joined(parts: Sequence[Hits], top: int) -> Hits:
    """The hits of all queries, from those of some at a time."""
    if not parts:
        return Hits(np.empty((0, top), np.int64), np.empty((0, top), np.float32))
    return Hits(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _exact(blocks: Sequence[Block], queries: np.ndarray, top: int) -> Hits:
    kept = top + SPARE
    scores = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for first, product in _products(blocks, queries):
        best = product.topk(min(kept, product.shape[1]))
        scores = torch.cat([scores, best.values], 1)
        rows = torch.cat([rows, best.indices + first], 1)
        scores, order = scores.topk(min(kept, scores.shape[1]))
        rows = rows.gather(1, order)
    found = []
    for query, (near, candidates) in enumerate(zip(scores.numpy(), rows.numpy(), strict=True)):
        if len(near) == kept and near[-1] > near[top - 1] - ROUNDING:
            # More are equally near than were kept: images that are there many times.
            candidates = _all_above(blocks, queries[query], near[top - 1] - ROUNDING)
        else:
            candidates = candidates[near > -np.inf]
        found.append(rescored(blocks, queries[query], candidates, top))
    return Hits(*(np.stack(arrays) for arrays in zip(*found, strict=True)))


def _products(blocks: Sequence[Block], queries: np.ndarray):
    """Row number and (Q, n) cosines of some rows after others; -inf for those that do not count."""
    given = torch.from_numpy(queries)
    step = max(1, AT_ONCE // max(1, len(queries)))
    for block in blocks:
        for start in range(0, len(block.vectors), step):
            part = slice(start, start + step)
            product = given @ torch.from_numpy(block.vectors[part]).T
            if block.live is not None:
                product[:, ~torch.from_numpy(block.live[part])] = -torch.inf
            yield block.first + start, product


def _all_above(blocks: Sequence[Block], query: np.ndarray, least: float) -> np.ndarray:
    rows = [
        first + (product[0] >= least).nonzero()[:, 0]
        for first, product in _products(blocks, query[None])
    ]
    return torch.cat(rows).numpy()


def rescored(
    blocks: Sequence[Block], query: np.ndarray, candidates: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` nearest of some rows and their exact cosines; of equal ones the first row first."""
    candidates = np.sort(candidates)
    scores = np.concatenate(
        [
            np.einsum("nd,d->n", vectors.astype(np.float64), query.astype(np.float64))
            for vectors in _taken(blocks, candidates)
        ]
        or [np.empty(0)]
    ).astype(np.float32)
    order = np.argsort(-scores, kind="stable")[:top]
    rows = np.full(top, -1, np.int64)
    cosines = np.full(top, -np.inf, np.float32)
    rows[: len(order)], cosines[: len(order)] = candidates[order], scores[order]
    return rows, cosines


def _taken(blocks: Sequence[Block], rows: np.ndarray):
    """The vectors of ascending rows, some at a time."""
    firsts = [block.first for block in blocks]
    owners = np.searchsorted(firsts, rows, side="right") - 1
    for owner in np.unique(owners):
        own = rows[owners == owner] - firsts[owner]
        for start in range(0, len(own), 1 << 16):
            yield blocks[owner].vectors[own[start : start + (1 << 16)]]
