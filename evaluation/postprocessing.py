"""Post-processing between embeddings and ranking: re-ranking, expansion and augmentation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metrics.expansion import expanded
from metrics.reranking import Reranking
from metrics.rows import Score
from options.ranking import Ranking


class Searched(NamedTuple):
    """The embeddings to search with, and in.

    Attributes:
        queries: (Q, d). gallery: (G, d), even if the queries search among themselves.
        score: the similarity, if it is not the cosine.
    """

    queries: Tensor
    gallery: Tensor
    score: Score | None = None


def postprocessed(queries: Tensor, gallery: Tensor | None, ranking: Ranking) -> Searched:
    """Augments the gallery, expands the queries in it, or re-ranks.

    Args:
        queries: (Q, d). gallery: (G, d); None if the queries search among themselves.

    Raises:
        ValueError: there are fewer images than neighbours to average.
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
