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
from utils import InputError, counted

if TYPE_CHECKING:
    from evaluation.thresholds import Thresholds, Verdict

NAMED = 3  # files that a sentence names


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
    """A query, by the path that was given, and what is nearest to it.

    Attributes:
        readable: whether the file is a picture; nothing is nearest to one that is not.
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
    """What is nearest to each of some image files; those that cannot be read are named in the log.

    Args:
        without_self: leaves out what is the same file as the query, byte by byte.
        ranking: what changes the order, see reordering.py.

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
    """The same of pictures that were embedded, as `vectors` (Q, d)."""
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
    """(Q, d), unit length, and which could be read, (Q,) bool.

    Files of more than one batch are read by all cores.
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
    """Raises InputError where a query could not be read; the sentence names the first ones."""
    bad = [answer.query for answer in answers if not answer.readable]
    if bad:
        named = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
        raise InputError(
            f"{len(bad):,} of {counted(len(answers))} cannot be read ({named}), and the others are "
            "answered; give other image files for these"
        )


def verdict_of(thresholds: Thresholds | None, cosine: float, same_file: bool) -> Verdict | None:
    """What an image that was found is called; None where the run gives no thresholds.

    Thresholds are of two pictures. The query's own file is the same by its bytes, even where no
    cosine would tell.
    """
    if thresholds is None:
        return None
    return "same" if same_file else thresholds.verdict(cosine)
