"""Answers to pictures: the images of an index that are nearest to them."""

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
from utils import InputError, counted, first_names

if TYPE_CHECKING:
    from evaluation.thresholds import Thresholds, Verdict


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        score: its cosine with the query. same_file: whether it is the query's own file.
        verdict: "same", "unsure" or "different"; "" if the run has no thresholds.
    """

    entry: Entry
    score: float
    same_file: bool
    verdict: str = ""


@dataclass(frozen=True)
class Answer:
    """A query's path, as given, and the images that are nearest to it.

    Attributes:
        readable: whether the file is a picture; if not, there are no hits.
    """

    query: str
    hits: list[Hit]
    readable: bool = True


def ask(
    index: Index,
    embedder: Embedder,
    pictures: Sequence[str],
    top: int,
    *,
    without_self: bool = False,
    ranking: Ranking | None = None,
) -> list[Answer]:
    """The images nearest to each of some image files; the log names files that cannot be read.

    Args:
        without_self: leaves out images whose files have the same bytes as the query.
        ranking: changes the order, see reordering.py.

    Raises:
        InputError: a file is missing, or none is a picture.
    """
    vectors, readable = _embedded(embedder, pictures)
    good = [picture for picture, is_one in zip(pictures, readable, strict=True) if is_one]
    found = iter(_answers(index, good, vectors[readable], top, without_self, ranking))
    pairs = zip(pictures, readable, strict=True)
    return [next(found) if is_one else Answer(picture, [], False) for picture, is_one in pairs]


def _answers(
    index: Index,
    pictures: Sequence[str],
    vectors: np.ndarray,
    top: int,
    without_self: bool,
    ranking: Ranking | None,
) -> list[Answer]:
    """The answers to readable pictures, whose embeddings are `vectors` (Q, d)."""
    top = min(top, len(index))
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


def _embedded(embedder: Embedder, pictures: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (Q, d) of unit length, and which pictures could be read, (Q,) bool.

    If they are more than one batch, processes on all cores read them.
    """
    if len(pictures) == 1:
        return embedder(pictures), np.ones(1, bool)
    one_batch = len(pictures) <= embedder.model.viewing.batch_size
    vectors, readable = embedded(embedder, pictures, workers=0 if one_batch else None)
    if not readable.any():
        raise InputError(f"none of {counted(len(pictures))} can be read; give other image files")
    return vectors, readable


def _hits(index: Index, found: Sequence[tuple[int, float]], mine: set[int]) -> list[Hit]:
    """Rows and scores as hits; `mine` are the rows of the query's own file."""
    thresholds = index.thresholds
    return [
        Hit(index.entry(row), score, row in mine, verdict_of(thresholds, score, row in mine) or "")
        for row, score in found
    ]


def check_all_answered(answers: Sequence[Answer]) -> None:
    """Raises InputError if a query could not be read; the sentence names the first ones."""
    bad = [answer.query for answer in answers if not answer.readable]
    if bad:
        raise InputError(
            f"{len(bad):,} of {counted(len(answers))} cannot be read ({first_names(bad)}), and the "
            "others are answered; give other image files for these"
        )


def verdict_of(thresholds: Thresholds | None, cosine: float, same_file: bool) -> Verdict | None:
    """The verdict on a hit; None if the run has no thresholds.

    The query's own file is always "same", even if no cosine is high enough to say so.
    """
    if thresholds is None:
        return None
    return "same" if same_file else thresholds.verdict(cosine)
