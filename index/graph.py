"""Approximate search: a graph of neighbours, by which a query visits only some thousand images.

The graph (HNSW: Malkov and Yashunin, TPAMI 2020) is usearch's. It is a file of its own beside the
index, and can be made again from it at any time. It finds candidates by number; those that were
removed are left out (if too few remain for a query, all images are compared with it), images that
were added after the graph are searched exactly, and all candidates are scored exactly.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.embedding import progress_bar
from index import form, journal, scanning
from index.journal import Record
from index.scanning import Block, Hits
from machine import cores
from options.searching import graph_of
from terminal import as_shell
from utils import DamagedError, InputError, damage_in_words, installing, program

PATIENCE = 0.1  # seconds for one query: if an exact search takes longer, a graph is worth it
SAMPLE = 1 << 16  # images for the timing of an exact search
NUMBERS = "i8"  # the type of the vectors in the graph
CONNECTIVITY, ON_ADDING = 16, 128  # edges of a node, and candidates from which they are chosen
DEPTH, LEAST = 4, 64  # candidates that are scored exactly, per wanted hit, and at least
BREADTH = 16  # usearch's search list, per candidate: finds .99 of the 10 nearest of a million
MOST_IN_VIEW = 1 << 14  # the longest search list: each node in it takes about 5 µs
AT_ONCE = 10_000  # images that are added to the graph between two updates of the bar


class Graph:
    """A graph of the first `covers` images ever added to an index."""

    def __init__(self, found: Any, covers: int, memory: Any = None) -> None:
        self._found = found
        self._memory = memory  # kept alive, because usearch has only its address
        self.covers = covers

    @classmethod
    def open(cls, index: Path, made: str, *, writable: bool = False) -> Graph | None:
        """The graph of an index; None if it has none.

        Args:
            made: the unique number of the index. writable: whether it is loaded into memory, to be
                extended, rather than read from the file.

        Raises:
            InputError: it cannot be used; the sentence says why, and how to make a new one.
        """
        path = graph_of(index)
        if not path.exists():
            return None
        usearch = _library()
        anew = f"make it again with {program('search')} approximate {as_shell(index)}"
        try:
            record = _kept(index)
            record.check("graph")
            with damage_in_words(f"graph {path}", "make it again"):
                form.check_graph(record)
        except DamagedError as error:
            raise InputError(f"{path} is damaged; {anew}") from error
        if record.content["made"] != made:
            raise InputError(f"{path} belongs to another index; {anew}")
        found = usearch.Index(**_settings(record.content["size"]))
        try:
            if writable:
                found.load(record.arrays["graph"].tobytes())
            else:
                found.view(memoryview(record.arrays["graph"]))
        except RuntimeError as error:
            raise InputError(
                f"{path} cannot be read by this version of usearch ({error}); {anew}"
            ) from error
        return cls(found, record.content["covers"], record)

    @classmethod
    def empty(cls, size: int) -> Graph:
        """A graph without images, for embeddings of `size` dimensions.

        Raises:
            InputError: usearch is not installed.
        """
        return cls(_library().Index(**_settings(size)), 0)

    def candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """(Q, ≤ count) numbers of the images that are probably nearest to each query; -1 for none.

        Args:
            queries: (Q, d) float32, unit length.
        """
        count = min(count, self.covers)
        self._found.expansion_search = max(count, min(BREADTH * count, MOST_IN_VIEW))
        found = self._found.search(queries, count, threads=cores() if len(queries) > 1 else 1)
        numbers = found.keys.reshape(len(queries), -1).astype(np.int64)
        counts = np.atleast_1d(getattr(found, "counts", numbers.shape[1]))
        numbers[np.arange(numbers.shape[1]) >= counts[:, None]] = -1
        return numbers

    def extend(self, blocks: Sequence[Block]) -> None:
        """Adds the images of an index that the graph does not cover yet."""
        total = blocks[-1].first + len(blocks[-1].vectors)
        missing = total - self.covers
        with progress_bar(f"graph of {total:,} images") as progress:
            for block in since(blocks, self.covers):
                for part in scanning.parts_of(len(block.vectors), AT_ONCE):
                    keys = np.arange(block.first + part.start, block.first + part.stop)
                    vectors = np.ascontiguousarray(block.vectors[part])
                    self._found.add(keys, vectors, threads=cores())
                    progress((block.first + part.stop - self.covers) / missing)
        self.covers = total

    def save(self, index: Path, made: str, size: int) -> None:
        """Writes the graph beside its index, atomically.

        Raises:
            InputError: it cannot be written there.
        """
        content = np.frombuffer(self._found.save(), np.uint8)
        with journal.writing_anew(graph_of(index)) as writer:
            about = {"kind": "graph", "made": made, "size": size, "covers": self.covers}
            writer.add(about, {"graph": content})


def _kept(index: Path) -> Record:
    """The record of the file at the path of an index's graph.

    Raises:
        InputError: the file is not a graph. DamagedError: it is not as it was written.
    """
    path = graph_of(index)
    try:
        with damage_in_words(f"graph {path}", "make it again"):
            records = journal.read(path).records
    except DamagedError:
        raise
    except InputError:
        records = []
    record = records[0] if records else None
    if record is None or record.content.get("kind") != "graph":
        raise InputError(
            f"{path} is not a graph that can be read here, and that of {index} would take its "
            "place; move it away, or give the index another name"
        )
    return record


def check_place(index: Path) -> None:
    """Raises InputError if a graph would overwrite a file that is not one.

    A damaged graph may be overwritten, because it can be made again.
    """
    if graph_of(index).exists():
        with contextlib.suppress(DamagedError):
            _kept(index)


def graph_stamp(index: Path) -> tuple[int, ...] | None:
    """Values that differ if the graph of an index was replaced; None if there is no graph."""
    try:
        found = os.stat(graph_of(index))  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def discard(index: Path) -> None:
    """Deletes the graph of an index; raises InputError as `check_place`."""
    check_place(index)
    graph_of(index).unlink(missing_ok=True)


def _library() -> Any:
    """usearch; raises InputError if it is not installed."""
    try:
        import usearch.index
    except ImportError as error:
        raise InputError(
            "an approximate search needs the package usearch, which is not installed here; "
            f"{installing('usearch')}"
        ) from error
    return usearch.index


def check_wanted(wanted: str) -> None:
    """Raises InputError if `wanted` is "yes" and graphs cannot be made here."""
    if wanted == "yes":
        _library()


def is_installed() -> bool:
    """Whether graphs can be made here."""
    try:
        _library()
    except InputError:
        return False
    return True


def _settings(size: int) -> dict[str, Any]:
    return {
        "ndim": size,
        "metric": "ip",
        "dtype": NUMBERS,
        "connectivity": CONNECTIVITY,
        "expansion_add": ON_ADDING,
    }


def since(blocks: Sequence[Block], start: int) -> list[Block]:
    """Blocks of the images from number `start` on."""
    found = []
    for block in blocks:
        skip = max(0, start - block.first)
        if skip < len(block.vectors):
            live = None if block.live is None else block.live[skip:]
            found.append(Block(block.first + skip, block.vectors[skip:], live))
    return found


# --- the search -----------------------------------------------------------------------------------


def search(
    graph: Graph, blocks: Sequence[Block], live: np.ndarray | None, queries: np.ndarray, top: int
) -> Hits:
    """The nearest of the candidates that the graph finds and of the images that it does not cover.

    Args:
        live: (added,) bool, False for removed images; None if none were removed.
    """
    count = max(DEPTH * top, LEAST)
    if live is not None:
        # More, because some of them will have been removed.
        count = int(count / max(live[: graph.covers].mean(), 0.1))
    numbers = graph.candidates(queries, count)
    rest = since(blocks, graph.covers)
    tail = scanning.exact(rest, queries, top).rows if rest else np.empty((len(queries), 0), int)
    images = sum(len(block.vectors) for block in blocks) if live is None else int(live.sum())
    found = []
    for query, near, new in zip(queries, numbers, tail, strict=True):
        both = np.concatenate([near[near >= 0], new[new >= 0]])
        if live is not None:
            both = both[live[both]]
        if len(both) < min(top, images):  # most candidates were removed images
            both = scanning.exact(blocks, query[None], top).rows[0]
            both = both[both >= 0]
        found.append(scanning.rescored(blocks, query, both, top))
    return scanning.joined(found, top)


# --- whether it is worth it -----------------------------------------------------------------------


def seconds_per_image(vectors: np.ndarray) -> float:
    """The time of an exact search for one query, per image, measured on this machine.

    Args:
        vectors: (n, d) of the first images of an index, at most `SAMPLE`.
    """
    if not len(vectors):
        return 0.0
    block = Block(0, np.resize(vectors, (SAMPLE, vectors.shape[1])))
    query, times = np.ascontiguousarray(vectors[:1]), []
    for _ in range(3):
        start = time.perf_counter()
        scanning.rescored([block], query[0], scanning.nearest([block], query, 10)[0], 10)
        times.append(time.perf_counter() - start)
    return min(times) / SAMPLE


def worth_from(seconds: float) -> int:
    """The number of images from which on a graph is worth it, given `seconds_per_image`."""
    exact = max(1, int(PATIENCE / max(seconds, 1e-9)))
    digits = max(1, 10 ** (len(str(exact)) - 2))
    return exact // digits * digits
