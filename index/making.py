"""Building an index, adding, removing, compacting, making its graph: one process at a time."""

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

NAMES_COMPARED = 10_000  # the most names that a misspelt one is compared with


def check_place(path: Path, overwrite: bool) -> None:
    """Raises InputError unless an index may be made at `path`: other files are not overwritten."""
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
    *,
    overwrite: bool = False,
) -> Outcome:
    """Makes an index of some images, which is at `path` once it is complete.

    Until then it grows in PATH.part, from which an interrupted build continues.

    Args:
        about: the result of `network.description`. overwrite: whether to replace an index.

    Raises:
        InputError: see `check_place` and `Adding.run`, or no image could be read.
    """
    path = followed(path)
    part = journal.part_of(path)
    with contextlib.suppress(OSError):  # reported by `held`
        path.parent.mkdir(parents=True, exist_ok=True)
    with held(path):
        check_place(path, overwrite)  # again: another process may have just made one
        if not _goes_on(part, about):
            journal.create(part, like=path)
            with journal.writing(part) as writer:
                writer.add(about, {})
        with journal.writing(part) as writer:
            adding = Adding(writer, embedder, how)
            place = {name: about[name] for name in ("run", "folder")}
            _bring_up_to_date(writer, adding.index, about.get("thresholds"), place)
            adding.keep_only(photos)  # first, so that no image counts as a copy of a removed one
            if len(adding.index):
                say(f"going on with the {len(adding.index):,} images of an interrupted build")
            outcome = adding.run(photos)
        if not len(adding.index):
            part.unlink()
            raise InputError("none of the images could be read, so there is nothing to search in")
        journal.put_in_place(part, path)
        graph.discard(path)  # of an index that stood here before
    return outcome


def _goes_on(part: Path, about: dict[str, Any]) -> bool:
    """Whether an interrupted build with the same network has left this file."""
    try:
        index = Index.open(part)
    except InputError:
        return False
    ignored = dict.fromkeys(("made", "run", "folder", "thresholds"))
    return {**index.about, **ignored} == {**about, **ignored}


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
        thresholds, place: the run's present thresholds and place (`network.measured`, `place_of`),
            which are stored in the index; None leaves the former ones.

    Raises:
        InputError: see `Adding.run`; or another process is changing the index.
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
    """Stores the run's present thresholds and place in the index; None leaves the former ones."""
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
    """Removes images from an index, and returns them.

    Args:
        names: ids, paths of files, or folders, for all images in them. missing: whether to remove
            images whose files no longer exist, too.

    Raises:
        InputError: no image has such a name; or with `missing`, no file exists at all, probably
            because a disk is not connected. Then none is removed.
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
    """Rewrites an index without the removed images; returns the number of bytes that this frees.

    The new file replaces the old one when it is complete.

    Raises:
        InputError: another process is changing the index, it is damaged, or the disk is full.
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
        graph.discard(path)  # the images have new numbers
        return before - path.stat().st_size


def _copied(index: Index, part: slice, *, first: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """The content and the arrays of a record with some rows of an index."""
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
        InputError: usearch is not installed, another process is changing the index, or it has no
            images.
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
        with contextlib.suppress(InputError):  # a graph that cannot be used is made again
            found = graph.Graph.open(path, made, writable=True)
        found = found or graph.Graph.empty(index.size)
        found.extend(index.blocks())
        found.save(path, made, index.size)
        return time.perf_counter() - began


class _Meant:
    """Finds the rows that a name stands for: an id, a path, or a folder for all images in it.

    Args:
        entries: the images of an index, by row. path: of the index.
    """

    def __init__(self, entries: Sequence[Entry], path: Path) -> None:
        self.path = path
        self.entries = entries
        self._ids = {entry.id: row for row, entry in enumerate(entries)}
        self._paths = sorted((entry.path, row) for row, entry in enumerate(entries))
        # By composed path, for names whose accents are encoded differently.
        self._alike = sorted((composed(path), row) for path, row in self._paths)

    def __call__(self, name: str) -> list[int]:
        """The rows; raises InputError if there are none."""
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
    """Those pairs (path, row), of sorted ones, whose path begins with `start`."""
    sought = range(bisect.bisect_left(paths, (start,)), len(paths))
    return takewhile(lambda each: each[0].startswith(start), map(paths.__getitem__, sought))


def _near(name: str, known: Collection[str]) -> str:
    close = close_names(name, known)
    return f"did you mean {join_words(close, 'or')}?" if close else "give an id, a file or a folder"
