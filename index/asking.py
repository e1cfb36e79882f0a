"""Pictures → what an index holds that is nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evaluation.inference import Embedder
from index.entries import Entry
from index.files import content_of, embedded
from index.gallery import Index
from index.reordering import best
from options.ranking import Ranking
from utils import InputError

if TYPE_CHECKING:
    from evaluation.thresholds import Thresholds, Verdict


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        score: its cosine with the query. same_file: whether it is the query's own file.
        verdict: "same", "unsure" or "different"; "" where the run gives no thresholds.
    """

    entry: Entry
    score: float
    same_file: bool
    verdict: str = ""


@dataclass(frozen=True)
class Answer:
    """A query, by the path that was given, and what is nearest to it."""

    query: str
    hits: list[Hit]


def ask(
    index: Index,
    embedder: Embedder,
    pictures: Sequence[str],
    top: int,
    *,
    without_self: bool = False,
    ranking: Ranking | None = None,
) -> list[Answer]:
    """What is nearest to each of some image files.

    Args:
        without_self: leaves out what is the same file as the query, byte by byte.
        ranking: what changes the order, see reordering.py.

    Raises:
        InputError: a file is missing or no picture.
    """
    top = min(top, len(index))
    vectors = _embedded(embedder, pictures)
    own = [index.rows_with(content_of(picture)) for picture in pictures]
    if ranking:
        return [
            Answer(picture, _hits(index, best(index, vector, top, hidden, ranking), mine))
            for picture, vector, mine in zip(pictures, vectors, own, strict=True)
            for hidden in [mine if without_self else set()]
        ]
    most = max(map(len, own), default=0) if without_self else 0
    found = index.search(vectors, top + most)
    answers = []
    for picture, mine, rows, scores in zip(pictures, own, found.rows, found.scores, strict=True):
        pairs = zip(rows.tolist(), scores.tolist(), strict=True)
        seen = [pair for pair in pairs if pair[0] >= 0 and not (without_self and pair[0] in mine)]
        answers.append(Answer(picture, _hits(index, seen[:top], mine)))
    return answers


def _embedded(embedder: Embedder, pictures: Sequence[str]) -> np.ndarray:
    """(Q, d), unit length; files of more than one batch are read by all cores."""
    if len(pictures) <= embedder.model.viewing.batch_size:
        return embedder(pictures)
    vectors, readable = embedded(embedder, pictures)
    if not readable.all():
        bad = [picture for picture, good in zip(pictures, readable, strict=True) if not good]
        also = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        raise InputError(f"{bad[0]}{also} cannot be read; give another image file")
    return vectors


def _hits(index: Index, found: Sequence[tuple[int, float]], mine: set[int]) -> list[Hit]:
    """Rows and scores as hits; `mine` are the rows of the query's own file."""
    thresholds = index.thresholds
    return [
        Hit(index.entry(row), score, row in mine, verdict_of(thresholds, score, row in mine) or "")
        for row, score in found
    ]


def verdict_of(thresholds: Thresholds | None, cosine: float, same_file: bool) -> Verdict | None:
    """What an image that was found is called; None where the run gives no thresholds.

    Thresholds are of two pictures. The query's own file is the same by its bytes, even where no
    cosine would tell.
    """
    if thresholds is None:
        return None
    return "same" if same_file else thresholds.verdict(cosine)
