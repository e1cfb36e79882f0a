"""Adding images to an index: new ones are embedded, known ones are left as they are."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from dataset.base import reason
from dataset.decoding import need_picture
from dataset.files import composed
from dataset.inventory import admitted_bad_images
from dataset.statuses import time_of
from evaluation.inference import Embedder
from index import codes
from index.entries import entry_arrays
from index.files import content_of, embedded
from index.form import CONTENT_SIZE
from index.gallery import Index
from index.journal import Writer
from index.known import File, Known
from index.sources import Photo
from machine import cores
from terminal import say, terminal_width
from utils import InputError, first_names, human_seconds

logger = logging.getLogger("index")

CHUNKS = (1024, 8192)  # the fewest and the most images that are embedded, and then added, at once
SECONDS = 60.0  # the time that a chunk should take, within these limits
TOLD_EVERY = 30.0  # seconds between lines about the progress, if there is no bar


@dataclass
class Outcome:
    """What happened to the images that were given.

    Attributes:
        added: number of new ones. unlabelled: number of these without a label.
        there: number of those that the index already had, unchanged.
        replaced: number of those whose files have changed.
        moved: number of those that have a new path, id or label.
        copies: (path, id) of images that were left out, and of the same picture in the index.
        bad: paths of unreadable images.
        seconds: the time that it took. embedded: number of images that the network has embedded.
    """

    added: int = 0
    unlabelled: int = 0
    there: int = 0
    replaced: int = 0
    moved: int = 0
    copies: list[tuple[str, str]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0
    embedded: int = 0


class _New(NamedTuple):
    """An image that will be added.

    Attributes:
        replaces: number → file of the images in the index that it replaces.
        vector: its embedding; None if it is still to be computed.
    """

    photo: Photo
    file: File
    replaces: Mapping[int, File]
    vector: np.ndarray | None = None


class _Chunk:
    """Images that are added together, and copies of them that are left out."""

    def __init__(self) -> None:
        self.news: list[_New] = []
        self.copies: list[tuple[str, bytes]] = []  # path, checksum
        self.touched: dict[int, File] = {}  # unchanged but for the time of their files
        self.contents: set[bytes] = set()
        self.ids: set[str] = set()

    def put(self, new: _New) -> None:
        """Notes an image, so that no other in the chunk has its id or its content."""
        self.news.append(new)
        self.contents.add(new.file.content)
        self.ids.add(new.photo.id)


class How(NamedTuple):
    """Settings for adding images.

    Attributes:
        workers: number of processes that read files; None: one per core.
        max_bad_images: the share of the given images that may be unreadable.
        keep_copies: whether to add pictures that the index already holds under another path.
    """

    workers: int | None = None
    max_bad_images: float = 1.0
    keep_copies: bool = False


USUAL = How()


class Adding:
    """Adds images to an index, whose lock this process holds."""

    def __init__(self, writer: Writer, embedder: Embedder, how: How = USUAL) -> None:
        self.writer = writer
        self.embedder = embedder
        self.how = how
        self.folder = str(writer.path.parent.absolute())
        self.index = Index.open(writer.path)
        self.known = Known(self.index)
        self._stayed: set[int] = set()  # numbers for which `_has_left` has found False
        self._given: dict[str, str] = {}  # id → path, of the given images that have an id

    def run(self, photos: Sequence[Photo]) -> Outcome:
        """Adds images; those that were added remain, even if a later one raises.

        Raises:
            InputError: two images have the same id, or too many cannot be read.
        """
        self._check_ids(photos)
        outcome, began = Outcome(), time.perf_counter()
        start, size, told = 0, CHUNKS[0], began
        while start < len(photos):
            stop = min(start + size, len(photos))
            whole = len(photos) <= size
            title = "embedding" if whole else f"{start + 1:,}-{stop:,} of {len(photos):,}"
            self._add(photos[start:stop], outcome, title)
            self._check_bad(outcome.bad, len(photos))
            start, now = stop, time.perf_counter()
            rate = stop / (now - began)
            size = int(min(max(CHUNKS[0], SECONDS * rate), CHUNKS[1]))
            if now - told > TOLD_EVERY and start < len(photos) and terminal_width() is None:
                left = human_seconds((len(photos) - stop) / rate)
                say(f"{stop:,} of {len(photos):,} images, {rate:.0f} images/s, {left} left")
                told = now
        outcome.seconds = time.perf_counter() - began
        return outcome

    def _check_ids(self, photos: Sequence[Photo]) -> None:
        """Raises InputError if two images would have the same id."""
        self._given = {}
        for photo in photos:
            if photo.id is None:
                continue
            other = self._given.setdefault(photo.id, photo.path)
            if other == photo.path and (known := self.known.with_id(photo.id)) is not None:
                path = self.index.entry_of(known).path
                other = path if os.path.lexists(path) else other
            if other != photo.path:
                raise InputError(
                    f"the id {photo.id} is given to {photo.path}, and {other} has it; give every "
                    "image an id of its own, or remove the other one first"
                )

    def _check_bad(self, bad: Sequence[str], count: int) -> None:
        share = self.how.max_bad_images
        if len(bad) > admitted_bad_images(share, count):
            raise InputError(
                f"{len(bad):,} of {count:,} images cannot be read so far, more than "
                f"--max-bad-images {share:g} admits ({first_names(bad)}); repair or remove "
                "them, or admit more; the same command goes on from here"
            )

    # --- one chunk ---

    def _add(self, photos: Sequence[Photo], outcome: Outcome, title: str) -> None:
        chunk = _Chunk()
        with ThreadPoolExecutor(cores()) as threads:
            for photo, file in zip(photos, threads.map(self._look, photos), strict=True):
                self._sort(photo, file, chunk, outcome)
        self._embed(chunk, outcome, title)
        for new in chunk.news:
            if new.vector is None:  # unreadable: the images that it would replace remain
                for number, known in new.replaces.items():
                    self.known.take(number, known)
        ready = [new for new in chunk.news if new.vector is not None]
        ids = {new.file.content: new.photo.id for new in ready}
        for path, content in chunk.copies:
            if content in ids:
                outcome.copies.append((path, ids[content]))
            else:
                outcome.bad.append(path)
        self._write(ready)
        self._note(chunk.touched)

    def _look(self, photo: Photo) -> File | Exception:
        """Size, time and checksum of a file, which is read only if its path or stamp is new."""
        try:
            need_picture(photo.path)
            status = os.stat(photo.path)  # noqa: PTH116
            stamp = (status.st_size, time_of(status))
            number = self.known.at(photo.path)
            old = None if number is None else self.known.file(number)
            return old if old and old.stamp == stamp else File(stamp, content_of(photo.path))
        except (OSError, ValueError) as error:
            return error

    def _sort(self, photo: Photo, file: File | Exception, chunk: _Chunk, outcome: Outcome) -> None:
        """Decides whether an image is new, has changed, has moved, or is already there."""
        if isinstance(file, Exception):
            logger.warning("%s cannot be read (%s); it is left out", photo.path, reason(file))
            outcome.bad.append(photo.path)
            return
        old, twins = self.known.at(photo.path), self.known.with_content(file.content)
        if old is not None and self.known.file(old).content == file.content:
            self._restate(photo, file, old, chunk, outcome)
        elif old is not None:
            self._put(photo, file, old, chunk)
        elif (left := next(filter(self._has_left, twins), None)) is not None:
            self._restate(photo, file, left, chunk, outcome)
        elif file.content in chunk.contents and not self.how.keep_copies:
            chunk.copies.append((photo.path, file.content))
        elif twins and not self.how.keep_copies:
            outcome.copies.append((photo.path, self.index.entry_of(twins[0]).id))
        else:
            self._put(photo, file, self.known.with_id(photo.id) if photo.id else None, chunk)

    def _has_left(self, number: int) -> bool:
        """Whether an image's file no longer exists, or holds another picture now."""
        if number in self._stayed:
            return False
        path = self.index.entry_of(number).path
        if not os.path.lexists(path):
            return True
        now = self._look(Photo(path))
        if isinstance(now, File) and now.content != self.known.file(number).content:
            return True
        self._stayed.add(number)
        return False

    def _restate(self, photo: Photo, file: File, old: int, chunk: _Chunk, outcome: Outcome) -> None:
        """Updates path, id and label of a known image; its embedding remains."""
        now, before = self._named(photo, old, chunk), self.index.entry_of(old)
        if (now.id, now.path, now.label) == (before.id, before.path, before.label):
            outcome.there += 1
            if file.stamp != self.known.file(old).stamp:
                chunk.touched[old] = file
                self.known.restamp(old, file)
            return
        outcome.moved += 1
        self._put(photo, file, old, chunk, self.index.embedding_of(old))

    def _put(
        self,
        photo: Photo,
        file: File,
        old: int | None,
        chunk: _Chunk,
        vector: np.ndarray | None = None,
    ) -> None:
        """Notes an image that replaces `old`, and the image that has had its id.

        Both are forgotten at once, so that no other image is compared with them or replaces them.
        """
        named = self._named(photo, old, chunk)
        replaced = {old, self.known.with_id(photo.id) if photo.id else None} - {None}
        chunk.put(_New(named, file, {each: self.known.drop(each) for each in replaced}, vector))

    def _named(self, photo: Photo, old: int | None, chunk: _Chunk) -> Photo:
        """The image with an id; an id and a label that are not given are those of `old`."""
        label = photo.label
        path = composed(photo.path)
        names = [composed(PurePath(os.path.relpath(photo.path, self.folder)).as_posix()), path]
        if old is not None:
            before = self.index.entry_of(old)
            label = label or before.label
            if not self.index.is_named_by_path(old):
                names.insert(0, before.id)
        free = (
            name
            for name in chain(names, (f"{path} ({number})" for number in count(2)))
            if self._given.get(name, photo.path) == photo.path
            and self.known.with_id(name) in (None, old)
            and name not in chunk.ids
        )
        return Photo(photo.path, photo.id or next(free), label)

    def _embed(self, chunk: _Chunk, outcome: Outcome, title: str) -> None:
        """Computes the vectors of the new images; those that cannot be read remain without."""
        places = [place for place, new in enumerate(chunk.news) if new.vector is None]
        if not places:
            return
        paths = [chunk.news[place].photo.path for place in places]
        vectors, readable = embedded(self.embedder, paths, self.how.workers, title)
        outcome.embedded += len(places)
        for place, path, vector, good in zip(places, paths, vectors, readable, strict=True):
            if not good:
                outcome.bad.append(path)
                continue
            new = chunk.news[place]
            chunk.news[place] = new._replace(vector=vector)
            if new.replaces:
                outcome.replaced += 1
            else:
                outcome.added += 1
                outcome.unlabelled += new.photo.label is None

    def _write(self, news: Sequence[_New]) -> None:
        """Writes a record of new images, and of those that they replace."""
        if not news:
            return
        first = self.index.added
        contents = b"".join(new.file.content for new in news)
        vectors = np.stack([new.vector for new in news])
        arrays = {
            "vectors": vectors,
            **self._codes(vectors),
            **entry_arrays([new.photo for new in news], self.folder),
            "contents": np.frombuffer(contents, np.uint8).reshape(-1, CONTENT_SIZE),
            "stamps": np.array([new.file.stamp for new in news], np.int64),
        }
        replaced = [number for new in news for number in new.replaces]
        if replaced:
            arrays["removed"] = np.array(replaced, np.int64)
        self.writer.add({"folder": self.folder}, arrays)
        self.index.refresh()
        for number, new in enumerate(news, first):
            self.known.take(number, new.file)

    def _note(self, touched: Mapping[int, File]) -> None:
        """The new times of unchanged files, so that these need not be read again."""
        if touched:
            stamps = np.array([file.stamp for file in touched.values()], np.int64)
            numbers = np.array(list(touched), np.int64)
            self.writer.add({}, {"touched": numbers, "touched_stamps": stamps})
            self.index.refresh()

    def _codes(self, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """The codes of a record's vectors; the first record determines their centre."""
        kind, centre = self.index.about["codes"], self.index.centre
        if kind == "none":
            return {}
        if centre is not None:
            return codes.as_arrays(kind, vectors, centre)
        centre = vectors.mean(axis=0)
        return {**codes.as_arrays(kind, vectors, centre), "centre": centre}

    def keep_only(self, photos: Sequence[Photo]) -> None:
        """Removes all images but these, and those of these whose id or label is no longer given."""
        wanted = {photo.path: photo for photo in photos}
        owners = {photo.id: photo.path for photo in photos if photo.id}
        others = [
            number
            for number in self.index.numbers().tolist()
            if not self._is_one_of(number, wanted, owners)
        ]
        if others:
            self.writer.add({}, {"removed": np.array(others, np.int64)})
            for number in others:
                self.known.drop(number)
            self.index.refresh()

    def _is_one_of(
        self, number: int, wanted: Mapping[str, Photo], owners: Mapping[str, str]
    ) -> bool:
        """Whether an image's path is wanted, with its id and label, if it has any of its own.

        Args:
            owners: id → path, of the wanted images that have an id.
        """
        entry = self.index.entry_of(number)
        photo = wanted.get(entry.path)
        if photo is None or owners.get(entry.id, entry.path) != entry.path:
            return False
        is_named = photo.id is not None or self.index.is_named_by_path(number)
        return is_named and (photo.label is not None or entry.label is None)
