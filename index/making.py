"""An index is made, grows, shrinks, is written anew, is given a graph: one process at a time."""

from __future__ import annotations

import bisect
import contextlib
import os
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dataset.files import composed
from evaluation.inference import Embedder
from index import codes, graph, journal
from index.adding import CHUNKS, USUAL, Adding, How, Outcome
from index.entries import Entry, entry_arrays
from index.gallery import Index
from index.sources import Photo, absolute
from machine import expanded
from storage import followed, held
from terminal import say
from utils import DamagedError, InputError, close_names, counted, join_words

NAMES_COMPARED = 10_000  # with a misspelt one: beyond, it would take too long


def check_place(path: Path, overwrite: bool) -> None:
    """Raises InputError unless an index may be made at `path`: what is no index stays."""
    if path.is_dir():
        raise InputError(f"--index {path} is a folder; name a file")
    graph.check_place(path)
    if not path.exists():
        return
    if not overwrite:
        raise InputError(
            f"{path} is there already; `add` adds images to it, and --overwrite replaces it"
        )
    with contextlib.suppress(DamagedError):
        Index.open(path)


def build(
    path: Path,
    photos: Sequence[Photo],
    embedder: Embedder,
    about: dict[str, Any],
    how: How = USUAL,
) -> Outcome:
    """Makes an index of some images; it is there once it is complete.

    Until then it grows in PATH.part; a build that was interrupted goes on with what is there.

    Args:
        about: what `network.description` says.

    Raises:
        InputError: see `Adding.run`, or no image could be read.
    """
    path = followed(path)
    part = journal.part_of(path)
    with contextlib.suppress(OSError):  # said by the next line
        path.parent.mkdir(parents=True, exist_ok=True)
    with held(path):
        if not _goes_on(part, about):
            journal.create(part, like=path)
            with journal.writing(part) as writer:
                writer.add(about, {})
        with journal.writing(part) as writer:
            adding = Adding(writer, embedder, how)
            place = {name: about[name] for name in ("run", "folder")}
            _bring_up_to_date(writer, adding.index, about.get("thresholds"), place)
            adding.keep_only(photos)  # first: no image is left out as a copy of one that goes
            if len(adding.index):
                say(f"going on with the {len(adding.index):,} images of an interrupted build")
            outcome = adding.run(photos)
        if not len(adding.index):
            part.unlink()
            raise InputError("none of the images could be read, so there is nothing to search in")
        part.replace(path)
        graph.discard(path)  # of an index that stood here before
    return outcome


def _goes_on(part: Path, about: dict[str, Any]) -> bool:
    """Whether an earlier build with the same network has left something here."""
    try:
        index = Index.open(part)
    except InputError:
        return False
    apart = dict.fromkeys(("made", "run", "folder", "thresholds"))
    return {**index.about, **apart} == {**about, **apart}


def add(
    path: Path,
    photos: Sequence[Photo],
    embedder: Embedder,
    thresholds: dict[str, Any] | None = None,
    place: dict[str, str] | None = None,
    how: How = USUAL,
) -> Outcome:
    """Adds images to an index; see `Adding`.

    Args:
        thresholds, place: what the run has measured by now, and where it is (`network.place_of`);
            the index takes them over.

    Raises:
        InputError: see `Adding.run`; another process changes the index.
    """
    path = followed(path)
    with journal.writing(path) as writer:
        adding = Adding(writer, embedder, how)
        _bring_up_to_date(writer, adding.index, thresholds, place)
        return adding.run(photos)


def _bring_up_to_date(
    writer: journal.Writer,
    index: Index,
    thresholds: dict[str, Any] | None,
    place: dict[str, str] | None,
) -> None:
    """Records what is known of the index's run by now; what is None stays as it was."""
    known = {name: index.about[name] for name in ("run", "folder")}
    news: dict[str, Any] = {}
    if thresholds and thresholds != index.about.get("thresholds"):
        news["thresholds"] = thresholds
    if place and place != known:
        news["place"] = place
    if news:
        writer.add(news, {})
        index.refresh()


def remove(path: Path, names: Sequence[str], missing: bool = False) -> list[Entry]:
    """Takes images out of an index; returns which.

    Args:
        names: ids, paths of files, or folders, for all that is below. missing: also those whose
            files are gone.

    Raises:
        InputError: a name means no image of the index, or no file is there, as where a disk is not
            connected; then none is removed.
    """
    path = followed(path)
    with journal.writing(path) as writer:
        index = Index.open(path)
        entries = list(index.entries())
        meant = _Meant(entries, path)
        rows = sorted({row for name in names for row in meant(name)})
        if missing:
            gone = [row for row, entry in enumerate(entries) if not os.path.lexists(entry.path)]
            if gone and len(gone) == len(entries):
                raise InputError(
                    f"not one file of {path} is there, so --missing would remove all "
                    f"{counted(len(gone))}; connect the disk that holds them "
                    f"({entries[0].path}), or delete the index"
                )
            rows = sorted({*rows, *gone})
        if rows:
            writer.add({}, {"removed": index.numbers()[rows].astype(np.int64)})
        return [entries[row] for row in rows]


def compact(path: Path) -> int:
    """Writes an index anew without what was removed; returns how many bytes that frees.

    The new file takes the place of the old one when it is complete.

    Raises:
        InputError: another process changes the index; it is damaged; or the disk is full.
    """
    path = followed(path)
    with held(path):
        index = Index.open(path)
        index.check()
        graph.check_place(path)
        before = path.stat().st_size
        with journal.writing_anew(path) as writer:
            writer.add({**index.about, "made": secrets.token_hex(8)}, {})
            for start in range(0, len(index), CHUNKS[1]):
                writer.add(*_copied(index, slice(start, start + CHUNKS[1]), first=start == 0))
        graph.discard(path)  # it numbers images as they were
        return before - path.stat().st_size


def _copied(index: Index, part: slice, *, first: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """Some rows of an index as a record."""
    numbers = index.numbers()[part]
    entries = [index.entry_of(number) for number in numbers.tolist()]
    folder = index.folder
    vectors, kind = index.rows(part), index.about["codes"]
    arrays = {
        "vectors": vectors,
        **entry_arrays(entries, folder),
        "contents": index.contents()[numbers],
        "stamps": index.stamps()[numbers],
    }
    if index.centre is not None:
        arrays |= codes.as_arrays(kind, vectors, index.centre)
        arrays |= {"centre": index.centre} if first else {}
    return {"folder": folder}, arrays


def approximate(path: Path) -> float:
    """Makes or extends the graph of an index, so that it covers all images; returns the seconds.

    Raises:
        InputError: usearch is not installed; another process changes the index; it has no images.
    """
    path = followed(path)
    with held(path):
        began = time.perf_counter()
        index = Index.open(path, exact=True)
        if not len(index):
            raise InputError(f"{path} holds no images to make a graph of; add some first")
        graph.check_place(path)
        made = index.about["made"]
        found = None
        with contextlib.suppress(InputError):  # what cannot be used is made anew
            found = graph.Graph.open(path, made, writable=True)
        found = found or graph.Graph.empty(index.size)
        found.extend(index.blocks())
        found.save(path, made, index.size)
        return time.perf_counter() - began


class _Meant:
    """The rows that a name stands for: an id, a path, or a folder for all that is below.

    Args:
        entries: the images of an index, by row. path: of the index.
    """

    def __init__(self, entries: Sequence[Entry], path: Path) -> None:
        self.path = path
        self.entries = entries
        self._ids = {entry.id: row for row, entry in enumerate(entries)}
        self._paths = sorted((entry.path, row) for row, entry in enumerate(entries))
        # However accents are put together.
        self._alike = sorted((composed(path), row) for path, row in self._paths)

    def __call__(self, name: str) -> list[int]:
        """The rows; raises InputError where there are none."""
        if (row := self._ids.get(composed(name))) is not None:
            return [row]
        place = absolute(expanded(name))
        below = place.rstrip(os.sep) + os.sep
        for paths, spelled in ((self._paths, str), (self._alike, composed)):
            file = [row for path, row in _starting(paths, spelled(place)) if path == spelled(place)]
            if found := file or [row for _, row in _starting(paths, spelled(below))]:
                return found
        ids = [entry.id for entry in self.entries[:NAMES_COMPARED]]
        known = {*ids, *(folder for id in ids for folder in map(str, PurePath(id).parents[:-1]))}
        raise InputError(f"{self.path} holds no image {name}; {_near(name, known)}")


def _starting(paths: Sequence[tuple[str, int]], start: str) -> Iterator[tuple[str, int]]:
    """Those of some sorted paths, and their rows, that begin with a text."""
    sought = range(bisect.bisect_left(paths, (start,)), len(paths))
    return takewhile(lambda each: each[0].startswith(start), map(paths.__getitem__, sought))


def _near(name: str, known: Collection[str]) -> str:
    close = close_names(name, known)
    return f"did you mean {join_words(close, 'or')}?" if close else "give an id, a file or a folder"
