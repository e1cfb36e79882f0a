"""`Index`: its images and their embeddings by row, and the search."""

from __future__ import annotations

import bisect
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dataset.files import composed
from evaluation.thresholds import Thresholds
from index import codes, form, journal, network, scanning
from index.entries import Entry, Segment
from index.form import CONTENT_SIZE
from index.graph import Graph, graph_stamp
from index.graph import search as search_graph
from index.journal import Reading, Record
from index.keys import Column, key_of
from index.scanning import Block, Hits
from machine import expanded
from storage import followed
from utils import DamagedError, InputError, damage_in_words, nearest_names

if TYPE_CHECKING:
    from evaluation.inference import Embedder

logger = logging.getLogger("index")

SMALL = 512  # records with fewer rows are concatenated in memory


def _halves(contents: np.ndarray) -> np.ndarray:
    """Checksums (n, CONTENT_SIZE) as two numbers each, (n, 2) uint64, which NumPy can sort."""
    return contents.view(np.uint64)


class Index:
    """A searchable gallery of images, as its file was when it was opened; `open` reads one.

    Its rows are 0, 1, … in the order in which the images were added, without the removed ones.
    """

    def __init__(self, path: Path, *, exact: bool = False) -> None:
        self.path = path
        self.exact = exact
        self._reading: Reading | None = None
        self.refresh()

    @classmethod
    def open(cls, path: str | Path, *, exact: bool = False) -> Index:
        """The index at `path`.

        Args:
            exact: whether searches compare with all vectors, without codes and graph.

        Raises:
            InputError: it does not exist, is damaged, or was written by a newer version.
        """
        return cls(Path(expanded(str(path))), exact=exact)

    def refresh(self) -> None:
        """Reads what was added to the file, or removed, since it was opened; raises as `open`."""
        # Another program may have written a file with right checksums and wrong content.
        with damage_in_words(f"index {self.path}", journal.ADVICE):
            reading = journal.read(self.path, self._reading)
            self.folder = str(followed(self.path).absolute().parent)  # paths are relative to it
            records = reading.records
            if reading.anew:
                self._begin(records)
                records = records[1:]
            for record in records:
                self._take(record)
            self._settle()
            self._reading = reading

    def _begin(self, records: Sequence[Record]) -> None:
        """Starts with no images, and the network that the first record describes."""
        first = records[0].content if records else {}
        if first.get("kind") == "graph":
            raise InputError(
                f"{self.path} is the graph of an index, not an index; give the index itself, the "
                "file beside it with this name without .graph"
            )
        if first.get("kind") != "network":
            raise DamagedError(f"index {self.path} does not name its network; {journal.ADVICE}")
        form.check_network(first)
        self.about: dict[str, Any] = dict(first)
        self.segments: list[Segment] = []
        self.added = 0  # number of images ever added, with the removed ones
        self.centre: np.ndarray | None = None  # (d,) see codes.py; None before the first images
        self._removed = np.empty(0, np.int64)
        self._touched: list[tuple[np.ndarray, np.ndarray]] = []  # (numbers, new stamps)

    def _take(self, record: Record) -> None:
        self.about |= {k: v for k, v in record.content.items() if k == "thresholds"}
        self.about |= record.content.get("place", {})  # the run's, see `network.place_of`
        form.check_network(self.about)
        record.check(*(name for name in record.arrays if name not in form.SEARCHED))
        form.check_arrays(record, self.about, self.added)
        if "centre" in record.arrays:
            self.centre = np.array(record.arrays["centre"])
        if "removed" in record.arrays:
            self._removed = np.concatenate([self._removed, record.arrays["removed"]])
        if "touched" in record.arrays:
            self._touched.append((record.arrays["touched"], record.arrays["touched_stamps"]))
        if "vectors" in record.arrays:
            self.segments.append(Segment.of(self.added, record))
            self.added += len(self.segments[-1])

    def _settle(self) -> None:
        """Derives rows and numbers from the records, and clears what is computed on demand."""
        self.live: np.ndarray | None = None  # (added,) bool; None if nothing was removed
        if len(self._removed):
            self.live = np.ones(self.added, bool)
            self.live[self._removed] = False
            self._numbers = np.flatnonzero(self.live)
            self._rows = np.cumsum(self.live) - 1
        self._firsts = [segment.first for segment in self.segments]
        self._blocks: list[Block] | None = None
        self._graph: Graph | None = None
        self._graph_sought = False
        self._graph_stamp: tuple[int, ...] | None = None  # when it was sought
        self._by_id: Column | None = None
        self._by_content: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def size(self) -> int:
        """The number of dimensions of an embedding."""
        return self.about["size"]

    def __len__(self) -> int:
        return self.added if self.live is None else len(self._numbers)

    def __repr__(self) -> str:
        return f"Index({self.path}: {len(self):,} images, {self.size} numbers each)"

    @property
    def has_labels(self) -> bool:
        """Whether any image was ever added with a label."""
        return any(len(segment.labels) for segment in self.segments)

    @property
    def is_current(self) -> bool:
        """Whether the file has not changed since it was read, nor the graph since it was used."""
        read = self._reading.mark, self._reading.source.identity
        graph = not self._graph_sought or self._graph_stamp == graph_stamp(self.path)
        return graph and journal.read_mark(self.path) == read

    def check_there(self) -> None:
        """Raises DamagedError if the file that was read has been truncated or overwritten since.

        An index that was replaced by another file, or deleted, can still be searched.
        """
        self._reading.source.check(self._reading.mark)

    # --- entries ---

    def entry(self, row: int) -> Entry:
        """The image in a row."""
        return self.entry_of(self.number(row))

    def id(self, row: int) -> str:
        """The id of the image in a row."""
        segment, place = self._place(self.number(row))
        return segment.id(place)

    def row(self, id: str) -> int:
        """The row of the image with this id.

        Raises:
            InputError: there is none.
        """
        id = composed(id)
        for row in self.rows_keyed(key_of(id)):
            if self.id(row) == id:
                return row
        ids = [self.id(row) for row in range(len(self))]
        raise InputError(f"{self.path} holds no image with the id {id}; {nearest_names(id, ids)}")

    def rows_keyed(self, key: np.uint64) -> list[int]:
        """The rows of the images whose ids have this key (see keys.py); hardly ever several."""
        return self.rows_of(np.array(self.by_id().numbers(key), np.int64)).tolist()

    def by_id(self) -> Column:
        """The numbers of the images by the keys of their ids."""
        if self._by_id is None:
            keys = [segment.id_keys() for segment in self.segments]
            numbers = self.numbers()
            self._by_id = Column(np.concatenate([np.empty(0, np.uint64), *keys])[numbers], numbers)
        return self._by_id

    def embedding(self, row: int) -> np.ndarray:
        """(d,) float32, unit length: the embedding of the image in a row."""
        return self.embedding_of(self.number(row))

    def rows(self, part: slice) -> np.ndarray:
        """(n, d) float32, unit length: the embeddings of consecutive rows."""
        numbers = self.numbers()[part]
        parts, segments = [], np.searchsorted(self._firsts, numbers, side="right") - 1
        for place in np.unique(segments):
            segment = self.segments[place]
            segment.record.check("vectors")
            parts.append(segment.vectors[numbers[segments == place] - segment.first])
        return np.concatenate(parts) if parts else np.empty((0, self.size), np.float32)

    # --- by number: the place among all images ever added, which removals do not change ---

    def number(self, row: int) -> int:
        """The number of the image in a row."""
        row = range(len(self))[row]
        return row if self.live is None else int(self._numbers[row])

    def numbers(self) -> np.ndarray:
        """(N,) the number of the image in each row."""
        return np.arange(self.added) if self.live is None else self._numbers

    def rows_of(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of images that were not removed, by number; -1 for -1."""
        return numbers if self.live is None else np.where(numbers < 0, -1, self._rows[numbers])

    def entries(self) -> Iterator[Entry]:
        """All images, in the order of their rows."""
        return map(self.entry_of, self.numbers().tolist())

    def entry_of(self, number: int) -> Entry:
        """The image with a number."""
        segment, place = self._place(number)
        path = self._found(segment.paths[place], segment.record.content["folder"])
        return Entry(segment.id(place), path, segment.label(place))

    def embedding_of(self, number: int) -> np.ndarray:
        """(d,) float32, unit length: the embedding of the image with a number."""
        segment, place = self._place(number)
        return np.array(segment.vectors[place])

    def is_named_by_path(self, number: int) -> bool:
        """Whether an image's id is its path, the default."""
        segment, place = self._place(number)
        return segment.id(place) == composed(segment.paths[place])

    def contents(self) -> np.ndarray:
        """(added, CONTENT_SIZE) uint8: the checksum of each image's file."""
        return self._all("contents", (0, CONTENT_SIZE), np.uint8)

    def rows_with(self, content: bytes) -> set[int]:
        """The rows of the images whose files have this checksum (see `files.content_of`)."""
        if self._by_content is None:
            contents = self.contents()
            order = np.argsort(_halves(contents)[:, 0], kind="stable")
            self._by_content = order, contents[order]
        order, contents = self._by_content
        halves, (first, second) = _halves(contents), np.frombuffer(content, np.uint64)
        start, stop = (np.searchsorted(halves[:, 0], first, side) for side in ("left", "right"))
        numbers = order[start:stop][halves[start:stop, 1] == second]
        if self.live is not None:
            numbers = numbers[self.live[numbers]]
        return set(self.rows_of(numbers).tolist())

    def stamps(self) -> np.ndarray:
        """(added, 2) int64: each file's size in bytes, and time of last change in nanoseconds."""
        stamps = self._all("stamps", (0, 2), np.int64)
        for numbers, later in self._touched:
            stamps[numbers] = later
        return stamps

    def _all(self, name: str, none: tuple[int, int], kind: type) -> np.ndarray:
        found = [segment.record.arrays[name] for segment in self.segments]
        return np.concatenate(found) if found else np.empty(none, kind)

    def _place(self, number: int) -> tuple[Segment, int]:
        """The segment that holds an image, and its place in it."""
        segment = self.segments[bisect.bisect_right(self._firsts, number) - 1]
        return segment, number - segment.first

    def _found(self, path: str, folder: str) -> str:
        """A record's path as an absolute one, from the index's present folder or its former one."""
        here = os.path.normpath(os.path.join(self.folder, path))  # noqa: PTH118
        if folder == self.folder or os.path.lexists(here):
            return here
        return os.path.normpath(os.path.join(folder, path))  # noqa: PTH118

    # --- search ---

    def search(self, embeddings: np.ndarray, top: int = 10) -> Hits:
        """The images nearest to each query by cosine, nearest first; ties go to the lower row.

        Args:
            embeddings: (Q, d), of any length except 0.

        Raises:
            InputError: they are not of the index's size.
        """
        queries = self._unit(embeddings)
        if (graph := self.graph) is not None:
            found = search_graph(graph, self.blocks(), self.live, queries, top)
        elif self.codes != "none":
            found = scanning.coded(self.blocks(), queries, top, self.codes, self.centre)
        else:
            found = scanning.exact(self.blocks(), queries, top)
        return found._replace(rows=self.rows_of(found.rows))

    @property
    def graph(self) -> Graph | None:
        """The graph that finds candidates; None if there is none, or if the search is exact."""
        if not self._graph_sought:
            self._graph_sought, self._graph_stamp = True, graph_stamp(self.path)
            try:
                self._graph = None if self.exact else Graph.open(self.path, self.about["made"])
            except InputError as error:
                logger.warning("the search is exact: %s", error)
        return self._graph

    @property
    def codes(self) -> str:
        """The codes that choose candidates, "int8" or "binary"; "none" without codes."""
        return "none" if self.exact or self.centre is None else self.about["codes"]

    def _unit(self, embeddings: np.ndarray) -> np.ndarray:
        given = np.asarray(embeddings, np.float32)
        if given.ndim != 2 or given.shape[1] != self.size:
            raise InputError(
                f"{self.path} holds embeddings of {self.size} numbers, and was asked with an array "
                f"of shape {given.shape}; embed with the network that made it"
            )
        return torch.nn.functional.normalize(torch.from_numpy(given), dim=1).numpy()

    def blocks(self) -> list[Block]:
        """All vectors, as few long blocks.

        At the first call, the arrays that a search reads are compared with their checksums: the
        vectors, or the codes, or the vectors that the graph lacks.
        """
        if self._blocks is None:
            self._blocks = list(self._in_blocks())
        return self._blocks

    def _in_blocks(self) -> Iterator[Block]:
        waiting: list[Segment] = []
        for segment in self.segments:
            if self.graph is None or segment.first + len(segment) > self.graph.covers:
                segment.record.check(*(("vectors",) if self.codes == "none" else ("codes", "step")))
            if len(segment) >= SMALL:
                yield from self._block(waiting)
                yield from self._block([segment])
                waiting = []
            else:
                waiting.append(segment)
        yield from self._block(waiting)

    def _block(self, segments: Sequence[Segment]) -> Iterator[Block]:
        """One block of consecutive segments; the vectors of a single one are not copied."""
        if not segments:
            return
        first, vectors = segments[0].first, segments[0].vectors
        if len(segments) > 1:
            vectors = np.concatenate([segment.vectors for segment in segments])
        live = None if self.live is None else self.live[first : first + len(vectors)]
        coded = None
        if self.codes != "none":
            parts = [codes.of_arrays(segment.record.arrays) for segment in segments]
            coded = codes.together(self.codes, parts) if len(parts) > 1 else parts[0]
        # If only candidates are scored, their vectors are read from the file one by one.
        sparing = len(segments) == 1 and (coded is not None or self.graph is not None)
        rows = partial(segments[0].record.rows, "vectors") if sparing else None
        yield Block(first, vectors, None if live is None or live.all() else live, coded, rows)

    def check(self) -> None:
        """Compares all arrays with their checksums.

        Raises:
            DamagedError: something differs.
        """
        for segment in self.segments:
            segment.record.check(*segment.record.arrays)

    # --- the network ---

    @property
    def thresholds(self) -> Thresholds | None:
        """The thresholds of verdicts that the run has measured; None if it has measured none.

        If they are those of a search, they hold for an index of this size (`Thresholds.in_index`).

        Raises:
            DamagedError: those in the index make no sense.
        """
        kept = self.about.get("thresholds")
        if not kept:
            return None
        with damage_in_words(f"index {self.path}", journal.ADVICE):
            thresholds = Thresholds.of_dict(kept)
        return thresholds if thresholds.found is None else thresholds.in_index(len(self))

    def embedder(
        self, device: str | torch.device | None = None, run: str | Path | None = None
    ) -> Embedder:
        """The network that made the index, as an `Embedder`.

        Args:
            run: the present place of its run, if it has moved.

        Raises:
            InputError: the run is not there, or has another network now.
        """
        return network.embedder_of(self.path, self.about, device, run)
