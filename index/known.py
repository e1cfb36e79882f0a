"""The files of an index, by which images that it already has are recognised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from dataset.files import composed
from index.gallery import Index


class File(NamedTuple):
    """A file's stamp (size, and time of last change) and the checksum of its content."""

    stamp: tuple[int, int]
    content: bytes


class Known:
    """The images of an index by path, id and checksum.

    Attributes:
        files: number → its file. ids: id → number.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.files: dict[int, File] = {}
        self.ids: dict[str, int] = {}
        self._paths: dict[str, int] = {}
        self._alike: dict[str, list[int]] = {}  # by composed path
        self._contents: dict[bytes, list[int]] = {}
        numbers = index.numbers()
        stamps = index.stamps()[numbers].tolist()
        contents = index.contents()[numbers]
        for number, stamp, content in zip(numbers.tolist(), stamps, contents, strict=True):
            self.take(number, File(tuple(stamp), content.tobytes()))

    def take(self, number: int, file: File) -> None:
        """Adds an image of the index, and its file."""
        entry = self.index.entry_of(number)
        self.files[number] = file
        self.ids[entry.id] = self._paths[entry.path] = number
        self._contents.setdefault(file.content, []).append(number)
        if not entry.path.isascii():
            self._alike.setdefault(composed(entry.path), []).append(number)

    def drop(self, number: int) -> File:
        """Forgets an image; returns its file."""
        entry, file = self.index.entry_of(number), self.files.pop(number)
        for known, key in ((self.ids, entry.id), (self._paths, entry.path)):
            if known.get(key) == number:
                del known[key]
        self._contents[file.content].remove(number)
        if not entry.path.isascii():
            self._alike[composed(entry.path)].remove(number)
        return file

    def at(self, path: str) -> int | None:
        """The image at a path, whether its accents are composed or not (see `composed`).

        Two files whose names only look the same are two images.
        """
        if path in self._paths or path.isascii():
            return self._paths.get(path)
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
        return self._contents.get(content, ())


def _is_another(known: str, path: str) -> bool:
    """Whether the file at `known` exists, and is not the one at `path`."""
    try:
        return not os.path.samefile(known, path)  # noqa: PTH121
    except OSError:
        return os.path.lexists(known)
