"""Other orders of the hits than that of the cosines alone.

- Query expansion (metrics/expansion.py): the query is moved towards the K nearest images of the
  index, and the search is repeated.
- k-reciprocal re-ranking (metrics/reranking.py) of a shortlist: the images that are found first are
  ordered by the neighbours that they share with the query. (Deviation: in the paper these are
  neighbours in the whole gallery; here they are those within the shortlist and the query.)

The scores remain the cosines with the picture itself, because verdicts are based on these.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from index.gallery import Index
from index.scanning import as_cosines
from metrics.reranking import Reranking
from options.ranking import Expansion, Ranking
from utils import InputError

SHORTLIST = 200  # images that are re-ranked


def best(
    index: Index, query: np.ndarray, top: int, left_out: Collection[int], ranking: Ranking
) -> list[tuple[int, float]]:
    """At most `top` pairs (row, cosine) for a query (d,), in the order of `ranking`.

    Args:
        left_out: rows that are ignored.

    Raises:
        InputError: the ranking needs more neighbours than the index has images.
    """
    direction = query
    if ranking.expansion:
        direction = _moved(index, query, left_out, ranking.expansion)
    shown = max(top, SHORTLIST) if ranking.reranking else top
    rows = _found(index, direction, shown, left_out)
    vectors = _vectors(index, rows)
    if ranking.reranking and rows:
        try:
            score = Reranking(query[None], vectors, *ranking.reranking)
        except ValueError as error:
            raise InputError(f"--rerank: {error}") from error
        order = score(torch.tensor([0]))[0].argsort(descending=True, stable=True).tolist()[:top]
        rows, vectors = [rows[place] for place in order], vectors[order]
    cosines = as_cosines(vectors.astype(np.float64) @ query.astype(np.float64))
    return list(zip(rows, cosines.tolist(), strict=True))


def _found(index: Index, query: np.ndarray, count: int, left_out: Collection[int]) -> list[int]:
    rows = index.search(query[None], count + len(left_out)).rows[0].tolist()
    return [row for row in rows if row >= 0 and row not in left_out][:count]


def _vectors(index: Index, rows: list[int]) -> np.ndarray:
    found = [index.embedding(row) for row in rows]
    return np.stack(found) if found else np.empty((0, index.size), np.float32)


def _moved(
    index: Index, query: np.ndarray, left_out: Collection[int], how: Expansion
) -> np.ndarray:
    """The query (d,), moved towards its K nearest images."""
    rows = _found(index, query, how.k, left_out)
    if len(rows) < how.k:
        raise InputError(
            f"--query-expansion {how.k}: the query finds {len(rows)} images in {index.path}; "
            "choose at most that"
        )
    vectors = _vectors(index, rows).astype(np.float64)
    moved = query + (vectors @ query).clip(0) ** how.alpha @ vectors
    return (moved / np.linalg.norm(moved)).astype(np.float32)
