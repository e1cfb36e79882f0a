"""What is done between embeddings and their ranking, as the flags of evaluate.py ask for it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metrics.expansion import expanded
from metrics.reranking import Reranking
from metrics.rows import Score
from options.ranking import Ranking


class Searched(NamedTuple):
    """What is searched with and in.

    Attributes:
        queries: (Q, d). gallery: (G, d), also where the queries search among themselves.
        score: what nearness is, where it is not the cosine.
    """

    queries: Tensor
    gallery: Tensor
    score: Score | None = None


def postprocessed(queries: Tensor, gallery: Tensor | None, ranking: Ranking) -> Searched:
    """Augments the gallery, expands the queries in it, or re-ranks.

    Args:
        queries: (Q, d). gallery: (G, d); None where the queries search among themselves.

    Raises:
        ValueError: more neighbours are asked for than there are.
    """
    images = queries if gallery is None else gallery
    if ranking.reranking:
        return Searched(queries, images, Reranking(queries, gallery, *ranking.reranking))
    if ranking.augmentation:
        images = expanded(images, None, *ranking.augmentation)
    if ranking.expansion:
        alone = gallery is None
        queries = expanded(queries, images, *ranking.expansion, own=alone)
    return Searched(queries, images)
