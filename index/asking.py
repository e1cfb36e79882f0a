"""Pictures → what an index holds that is nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.inference import Embedder
from index.adding import content_of
from index.gallery import Entry, Index


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
) -> list[Answer]:
    """What is nearest to each of some image files.

    Args:
        without_self: leaves out what is the same file as the query, byte by byte.

    Raises:
        InputError: a file is missing or no picture.
    """
    vectors = embedder(list(pictures))
    own = [same_files(index, picture) for picture in pictures]
    most = max(map(len, own), default=0) if without_self else 0
    found = index.search(vectors, top + most)
    answers = []
    for picture, mine, rows, scores in zip(pictures, own, found.rows, found.scores, strict=True):
        hits = []
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            if row < 0 or (without_self and row in mine):
                continue
            verdict = index.thresholds.verdict(score) if index.thresholds else ""
            hits.append(Hit(index.entry(row), score, row in mine, verdict))
        answers.append(Answer(picture, hits[:top]))
    return answers


def same_files(index: Index, path: str | Path) -> set[int]:
    """The rows whose files are, byte by byte, the one at `path`."""
    content = np.frombuffer(content_of(path), np.uint8)
    numbers = np.flatnonzero((index.contents() == content).all(axis=1))
    if index.live is not None:
        numbers = numbers[index.live[numbers]]
    return set(index.rows_of(numbers).tolist())
