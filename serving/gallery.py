"""The index as it is on disk, its network, and one search at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from index import Index
from serving.pictures import Crop, query_pixels
from utils import InputError

if TYPE_CHECKING:
    from evaluation.inference import Embedder
    from index import Entry

logger = logging.getLogger("serving")

FARTHEST, MOST_LISTED = 10_000, 50_000
"""The most entries whose labels are compared with the wanted one, among the nearest and in a list:
each takes about 5 µs."""

Wanted = Callable[["Entry"], bool] | None


class State(NamedTuple):
    """An index as it was at one moment, and the network of its embeddings."""

    index: Index
    embedder: Embedder

    @property
    def upright(self) -> bool:
        """Whether pictures are turned according to their EXIF orientation."""
        return self.embedder.model.upright


class Query(NamedTuple):
    """A query.

    Attributes:
        source: an entry's row, or a picture's path or bytes. crop: the part of it to search for.
        wanted: a test that results must pass. without: a row that is left out.
    """

    source: int | str | bytes
    top: int
    crop: Crop | None = None
    wanted: Wanted = None
    without: int | None = None


class Gallery:
    """An index that many threads may use.

    Searches run one after the other, in a thread of their own: torch keeps a set of threads for
    each thread that calls it, and those of a connection would not end with the connection.

    Attributes:
        path: of the index.

    Raises:
        InputError: there is no usable index, or its network cannot be opened.
    """

    def __init__(self, path: Path, device: str | None = None, run: str | None = None) -> None:
        self.path = path
        self._opening, self._keying = threading.Lock(), threading.Lock()
        self._warned = ""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._how = {"device": device, "run": run}
        index = Index.open(path)
        self._state = State(index, index.embedder(**self._how))

    def now(self) -> State:
        """The index as it is on disk; if it has been deleted or damaged since, as it was.

        Raises:
            InputError: the file was overwritten, so that it cannot be read as it was.
        """
        with self._opening:
            try:
                if not self._state.index.is_current:
                    self._state = self._opened_again()
                self._warned = ""
            except InputError as error:
                self._state.index.check_there()
                self._warn(str(error))
            return self._state

    def _opened_again(self) -> State:
        index, before = Index.open(self.path), self._state
        same = index.about["fingerprint"] == before.index.about["fingerprint"]
        return State(index, before.embedder if same else index.embedder(**self._how))

    def _warn(self, sentence: str) -> None:
        """Warns once, not for every request, that the index is served as it was before."""
        if sentence != self._warned:
            logger.warning("the index is served as it was: %s", sentence)
        self._warned = sentence

    def close(self) -> None:
        """Waits for the present search; no other one begins."""
        self._worker.shutdown(cancel_futures=True)

    def rows_keyed(self, state: State, key: int) -> list[int]:
        """`Index.rows_keyed`; one thread makes the keys of all ids, and others wait for them."""
        with self._keying:
            return state.index.rows_keyed(np.uint64(key))

    # --- searching --------------------------------------------------------------------------------

    def nearest(self, state: State, query: Query) -> tuple[list[tuple[int, float]], int]:
        """Rows and cosines of the nearest entries, and the number of entries that were looked at.

        Raises:
            InputError: the picture cannot be read.
        """
        return self._worker.submit(_nearest, state, query).result()

    @staticmethod
    def spread(state: State, count: int, wanted: Wanted) -> tuple[list[int], int]:
        """Rows of `count` entries from all over the index, and the number that were looked at.

        Args:
            wanted: a test that entries must pass; then only the first `MOST_LISTED` are looked at.
        """
        rows: Sequence[int] = range(len(state.index))
        looked_at = len(rows)
        if wanted is not None:
            looked_at = min(looked_at, MOST_LISTED)
            rows = [row for row in rows[:looked_at] if wanted(state.index.entry(row))]
        places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
        return [rows[place] for place in places.tolist()], looked_at


def _nearest(state: State, query: Query) -> tuple[list[tuple[int, float]], int]:
    if isinstance(query.source, int):
        embedding = state.index.embedding(query.source)[None]
    else:
        embedding = state.embedder(query_pixels(query.source, state.upright, query.crop))
    top, wanted, without = query.top, query.wanted, query.without
    most = len(state.index) if wanted is None else min(FARTHEST, len(state.index))
    reach = min(top + (without is not None), most)
    if reach == 0:
        return [], 0
    while True:
        rows, scores = (part[0] for part in state.index.search(embedding, reach))
        hits = [
            (int(row), float(score))
            for row, score in zip(rows, scores, strict=True)
            if row >= 0 and row != without and np.isfinite(score)
            if wanted is None or wanted(state.index.entry(int(row)))
        ]
        if len(hits) >= top or reach >= most:
            return hits[:top], reach
        reach = min(8 * reach, most)
