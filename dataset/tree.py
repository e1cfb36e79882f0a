"""Finds all pictures below a folder in one walk, which follows links to folders."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.decoding import reason
from dataset.files import in_class_order, is_folder_entry, is_hidden, is_image
from utils import InputError, counted, join_words

# Files that are often kept with pictures and show pictures too, but are not read here.
_SOURCES_OF_PICTURES = frozenset(
    ".cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .dng .orf .rw2 .raf .pef .raw .exr .hdr .psd .psb "
    ".xcf .svg .svgz .eps .dcm .mp4 .mov .avi .mkv .webm".split()
)


@dataclass(frozen=True, eq=False)
class Tree:
    """The pictures below a folder, found in one walk; see `tree`.

    Attributes:
        folder: its top. pictures: sorted paths relative to it, parts joined by "/".
        folders: the folders in it, likewise. remarks: what was left out but may have been meant.
        others: the numbers of files that are no pictures, by suffix.
    """

    folder: Path
    pictures: tuple[str, ...]
    folders: tuple[str, ...]
    remarks: tuple[str, ...]
    others: Counter[str]
    _stamps: dict[str, tuple[int, ...]]

    @property
    def is_current(self) -> bool:
        """Whether no folder has changed since the walk."""
        return all(_stamp(path) == stamp for path, stamp in self._stamps.items())

    def top_level(self) -> list[str]:
        """Names of the folders directly in `folder`, in class order."""
        return in_class_order(name for name in self.folders if "/" not in name)


_trees: dict[str, Tree] = {}
_KEPT_TREES = 8
_TICK = 0.01  # seconds: the resolution of times in file systems


def tree(folder: Path) -> Tree:
    """All pictures below a folder, which is walked once per process, unless it changes.

    Links to folders are followed, except a link to a folder that contains it. Unreadable folders
    are named in `remarks`.

    Raises:
        InputError: `folder` itself cannot be read.
    """
    key = os.path.abspath(folder)  # noqa: PTH100 (leaves links as they are)
    found = _trees.pop(key, None)
    if found is None or not found.is_current:
        found = _Walk(Path(folder)).run()
    _trees[key] = found
    while len(_trees) > _KEPT_TREES:
        _trees.pop(next(iter(_trees)))
    return found


class _Walk:
    """Walks a folder; `run` returns what it finds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures: list[str] = []
        self.folders: list[str] = []
        self.remarks: list[str] = []
        self.others: Counter[str] = Counter()
        self.stamps: dict[str, tuple[int, ...]] = {}

    def run(self) -> Tree:
        try:
            os.scandir(self.folder).close()
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be read ({reason(error)}); check its permissions"
            ) from error
        above = [self.folder.resolve(), *self.folder.resolve().parents]
        waiting = [("", frozenset(_identity(str(path)) for path in above[1:]))]
        while waiting:
            waiting.extend(self._enter(*waiting.pop()))
        self._wait_for_the_clock()
        return Tree(
            self.folder,
            tuple(sorted(self.pictures)),
            tuple(sorted(self.folders)),
            (*self.remarks, *_words_on(self.folder, self.others)),
            self.others,
            self.stamps,
        )

    def _enter(self, inside: str, above: frozenset) -> list[tuple[str, frozenset]]:
        """Record a folder's files, and return the folders in it."""
        path = os.path.join(self.folder, inside)  # noqa: PTH118 (Path objects cost too much here)
        try:
            identity, self.stamps[path] = _identity(path), _stamp(path)
            if identity in above:
                self._remark(path, "leads back to a folder that contains it; it is not followed")
                return []
            with os.scandir(path) as entries:
                found = list(entries)
        except OSError as error:
            self._remark(path, f"cannot be read ({reason(error)}); it is left out")
            return []
        if inside:
            self.folders.append(inside)
        prefix = f"{inside}/" if inside else ""
        here = []
        for entry in found:
            if is_hidden(entry.name):
                continue
            if is_folder_entry(entry):
                here.append(prefix + entry.name)
            elif is_image(entry.name):
                self.pictures.append(prefix + entry.name)
            else:
                self.others[Path(entry.name).suffix.lower()] += 1
                if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                    self._remark(entry.path, "is a link to nothing; it is left out")
        return [(each, above | {identity}) for each in here]

    def _remark(self, path: str, text: str) -> None:
        self.remarks.append(f"{path} {text}")

    def _wait_for_the_clock(self) -> None:
        """Wait for the file system's next tick, so that later changes have another time."""
        newest = max((stamp[0] for stamp in self.stamps.values()), default=0) / 1e9
        time.sleep(min(max(newest + _TICK - time.time(), 0), _TICK))


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


def _stamp(path: str) -> tuple[int, ...]:
    """A value that changes with the entries of a folder, and with its permissions."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return (0,)
    return max(status.st_mtime_ns, status.st_ctime_ns), status.st_mtime_ns, status.st_ino


def _words_on(folder: Path, others: Counter[str]) -> Iterator[str]:
    left_out = {suffix: others[suffix] for suffix in sorted(others.keys() & _SOURCES_OF_PICTURES)}
    if left_out:
        files = (counted(count, f"{suffix} file") for suffix, count in left_out.items())
        yield f"{folder}: {join_words(files, 'and')}, not read as pictures, left out"
