"""The files of an index, by which images that it already has are recognised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from dataset.files import composed
from index.entries import Segment
from index.gallery import Index
from index.keys import Column, key_of


class File(NamedTuple):
    """A file's stamp (size, and time of last change) and the checksum of its content."""

    stamp: tuple[int, int]
    content: bytes


class Known:
    """The images of an index by path, id and checksum.

    Those that the index has when this is made are found in its arrays by keys, since dictionaries
    of a million images take seconds and a gigabyte; those that come later are in dictionaries.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._stamps, self._contents = index.stamps(), index.contents()
        self._alike: dict[str, list[int]] = {}  # by composed path, of paths that are not ASCII
        numbers = index.numbers()
        paths = [self._path_keys(segment) for segment in index.segments]
        none = np.empty(0, np.uint64)
        self._by_id = index.by_id()
        self._by_path = Column(np.concatenate([none, *paths])[numbers], numbers)
        self._by_content = Column(self._contents.view(np.uint64)[numbers, 0], numbers)
        for number in numbers[self._is_composable()[numbers]].tolist():
            self._alike.setdefault(composed(index.entry_of(number).path), []).append(number)
        self._gone: set[int] = set()  # of the images that were there at first
        self._files: dict[int, File] = {}  # later, or with a new stamp
        self._ids: dict[str, int] = {}
        self._paths: dict[str, int] = {}
        self._later: dict[bytes, list[int]] = {}  # by content

    def _path_keys(self, segment: Segment) -> np.ndarray:
        """The keys of its images' paths, relative to the folder of the index."""
        if segment.record.content["folder"] == self.index.folder:
            return segment.paths.keys()
        numbers = range(segment.first, segment.first + len(segment))
        paths = (self.index.entry_of(number).path for number in numbers)
        return np.array([key_of(self._relative(path)) for path in paths], np.uint64)

    def _is_composable(self) -> np.ndarray:
        """(added,) bool: the images whose paths have letters that can be written in two ways."""
        segments = self.index.segments
        folders = np.repeat(
            [not segment.record.content["folder"].isascii() for segment in segments],
            [len(segment) for segment in segments],
        )
        here = not self.index.folder.isascii()
        own = [~segment.paths.are_ascii() for segment in segments]
        return np.concatenate([np.empty(0, bool), *own]) | folders.astype(bool) | here

    def _relative(self, path: str) -> str:
        return PurePath(os.path.relpath(path, self.index.folder)).as_posix()

    def file(self, number: int) -> File:
        """The file of an image."""
        if (known := self._files.get(number)) is not None:
            return known
        return File(tuple(self._stamps[number].tolist()), self._contents[number].tobytes())

    def restamp(self, number: int, file: File) -> None:
        """Notes the file of an image that has a new stamp, and the same content."""
        self._files[number] = file

    def take(self, number: int, file: File) -> None:
        """Adds an image of the index, and its file."""
        entry = self.index.entry_of(number)
        self._files[number] = file
        self._ids[entry.id] = self._paths[entry.path] = number
        self._later.setdefault(file.content, []).append(number)
        if not entry.path.isascii():
            self._alike.setdefault(composed(entry.path), []).append(number)

    def drop(self, number: int) -> File:
        """Forgets an image; returns its file."""
        entry, file = self.index.entry_of(number), self.file(number)
        self._gone.add(number)
        self._files.pop(number, None)
        for known, key in ((self._ids, entry.id), (self._paths, entry.path)):
            if known.get(key) == number:
                del known[key]
        if number in (later := self._later.get(file.content, [])):
            later.remove(number)
        if not entry.path.isascii():
            self._alike[composed(entry.path)].remove(number)
        return file

    def with_id(self, id: str) -> int | None:
        """The image with an id."""
        if id in self._ids:
            return self._ids[id]
        numbers = self._there(self._by_id, key_of(id))
        return next((each for each in numbers if self.index.entry_of(each).id == id), None)

    def at(self, path: str) -> int | None:
        """The image at a path, whether its accents are composed or not (see `composed`).

        Two files whose names only look the same are two images.
        """
        if path in self._paths:
            return self._paths[path]
        for number in self._there(self._by_path, key_of(self._relative(path))):
            if self.index.entry_of(number).path == path:
                return number
        if path.isascii():
            return None
        return next(
            (
                number
                for number in self._alike.get(composed(path), ())
                if not _is_another(self.index.entry_of(number).path, path)
            ),
            None,
        )

    def with_content(self, content: bytes) -> Sequence[int]:
        """The images whose files have this checksum; several, if copies were kept."""
        numbers = self._there(self._by_content, np.frombuffer(content, np.uint64)[0])
        first = [each for each in numbers if self._contents[each].tobytes() == content]
        return [*first, *self._later.get(content, ())]

    def _there(self, column: Column, key: np.uint64) -> list[int]:
        """The images with a key that were there at first, and still are."""
        return [number for number in column.numbers(key) if number not in self._gone]


def _is_another(known: str, path: str) -> bool:
    """Whether the file at `known` exists, and is not the one at `path`."""
    try:
        return not os.path.samefile(known, path)  # noqa: PTH121
    except OSError:
        return os.path.lexists(known)
