"""Finds the files of a data set: folders in any letter case, names of pictures, list files.

tree.py finds all pictures below a folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import storage
from dataset.decoding import need_file, reason
from utils import InputError

logger = logging.getLogger("dataset")
# Announces work that takes long or much disk space; shown even where only warnings are.
announcements = logging.getLogger("dataset.announcements")
announcements.setLevel(logging.INFO)

_PHOTOGRAPHS = {".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".avif", ".avifs"}
_OTHER_PICTURES = {
    *(".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga", ".icb", ".vda", ".vst"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".sgi", ".rgb", ".rgba", ".bw", ".dds"),
    *(".qoi", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ras", ".xbm", ".xpm"),
}
# Pillow alone may not read these, but they are listed, so that errors name them.
_RARE_PICTURES = {".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl"}
IMAGE_SUFFIXES = frozenset(_PHOTOGRAPHS | _OTHER_PICTURES | _RARE_PICTURES)

# Names, in lower case, that operating systems, NAS devices and programs leave in folders.
_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "@snapshot"),
        *("$recycle.bin", "recycler", "recycled", "system volume information", "lost+found"),
        *("found.000", "network trash folder", "temporary items", "__pycache__"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    )
)


# --- warnings -------------------------------------------------------------------------------------

_said: set[str] = set()


def warn_once(message: str, to: logging.Logger = logger, level: int = logging.WARNING) -> None:
    """Log a message once per process, because a run reads its data many times.

    A message below the logger's level does not count as logged.
    """
    if message not in _said and to.isEnabledFor(level):
        _said.add(message)
        to.log(level, "%s", message)


@contextlib.contextmanager
def said_anew() -> Iterator[None]:
    """A context in which messages that were logged before are logged again."""
    before = set(_said)
    _said.clear()
    try:
        yield
    finally:
        _said.update(before)


# --- one file or folder ---------------------------------------------------------------------------


def find_all(folder: Path, relative: str) -> list[Path]:
    """Files and folders at `folder`/`relative` in any letter case; an exact match comes first."""
    found = [Path(folder)]
    for part in Path(relative).parts:
        found = [entry for parent in found for entry in _entries_called(parent, part)]
    return found


def find(folder: Path, *relatives: str) -> Path | None:
    """The first of `relatives` that exists in `folder`, in any letter case; None if none does."""
    return next((path for relative in relatives for path in find_all(folder, relative)), None)


def need(folder: Path, *relatives: str) -> Path:
    """The path that `find` finds.

    Raises:
        InputError: none of `relatives` exists.
    """
    path = find(folder, *relatives)
    if path is None:
        raise InputError(f"{folder} has no {relatives[0]}; copy it there from the original archive")
    return path


def _entries_called(folder: Path, name: str) -> list[Path]:
    exact = folder / name
    try:
        entries = [entry for entry in folder.iterdir() if entry.name.lower() == name.lower()]
    except OSError:
        return []
    return sorted(entries, key=lambda entry: (entry != exact, entry))


def is_file(path: Path | str) -> bool:
    """Whether a plain file is there; False also for a path that no file can have."""
    return os.path.isfile(path)  # noqa: PTH113 (Path.is_file raises for names that are too long)


def is_folder(path: Path | str) -> bool:
    """Whether a folder is there; False also for a path that no folder can have."""
    return os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises for names that are too long)


def is_gone(path: Path | str) -> bool:
    """Whether a path does not exist; one without permission exists, and reading it will say so."""
    try:
        os.stat(path)  # noqa: PTH116
    except PermissionError:
        return False
    except (OSError, ValueError):
        return True
    return False


def is_image(name: str) -> bool:
    """Whether a file name is that of a picture; hidden files (macOS's "._x.jpg") are not."""
    return not is_hidden(name) and Path(name).suffix.lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or the system's: ".x", "@eaDir", "$RECYCLE.BIN"."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, see `in_class_order`; [] if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if is_folder_entry(entry)]
    except OSError:
        return []
    return in_class_order(name for name in found if not is_hidden(name))


def is_folder_entry(entry: os.DirEntry) -> bool:
    """Whether an entry of a folder is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def in_class_order(names: Iterable[str]) -> list[str]:
    """Class names sorted as numbers if all of them are whole numbers, else by character code."""
    names = list(names)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def safe_name(name: str, listed_in: Path) -> str:
    """A path from a list file, with "/" between its parts.

    Raises:
        InputError: it is absolute or leads out of the data set's folder.
    """
    clean = name.replace("\\", "/")
    if clean.startswith("/") or clean[1:2] == ":" or ".." in clean.split("/"):
        raise InputError(
            f"{listed_in} names {name!r}, which leads out of the data set's folder; no published "
            "list does that: get it again from its source"
        )
    return clean


MOST_BYTES = 1_000_000_000  # of a list of images


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        OSError: it cannot be read, or is no plain file. UnicodeDecodeError: it is no such text.
    """
    need_file(path)
    return storage.read_text(path, MOST_BYTES)


def read_rows(path: Path, columns: int, skip: int = 0) -> list[list[str]]:
    """The rows of a list file, split at white space, after its first `skip` lines.

    Raises:
        InputError: the file is missing or no text, or a row does not have `columns` columns.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}); get it again from its source"
        ) from error
    rows = [(number, line.split()) for number, line in enumerate(lines[skip:], skip + 1)]
    for number, row in rows:
        if row and len(row) != columns:
            raise InputError(
                f"{path} line {number} has {len(row)} columns instead of {columns}; "
                "get the file again from its source"
            )
    return [row for _, row in rows if row]


def whole_numbers(texts: Sequence[str], path: Path) -> list[int]:
    """The numbers in a column of the list file `path`; InputError for anything else."""
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise InputError(
            f"{path} has something else in a column of numbers ({error}); "
            "get the file again from its source"
        ) from error


def composed(name: str) -> str:
    """A name with composed accents (Unicode's NFC); folders from a Mac have decomposed ones.

    It makes equal names compare equal: of classes, labels, and files to find.
    """
    return unicodedata.normalize("NFC", name)


def folded(text: str) -> str:
    """Text for comparing and searching: `composed`, without letter case."""
    return composed(text).casefold()


class OnDisk:
    r"""Finds how a path in a list or a table is spelled on disk.

    A path from Windows has "\" between its parts, and may have "A.JPG" for a file called "a.jpg".
    One from a Mac, or a disk from there, may compose accents differently (Unicode's NFC and NFD). A
    path that exists is never changed.

    Args:
        folder: the folder that relative paths start from.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._spelled: dict[str, str] = {}  # folders
        self._names: dict[str, set[str]] = {}  # in each folder
        self._alike: dict[str, dict[str, str]] = {}  # the same, by how they compare

    def __call__(self, path: str) -> str:
        """A path, relative or absolute, as spelled on disk; unchanged if nothing is there."""
        if "\\" in path and not self.is_there(path):
            path = path.replace("\\", "/")
        return self._file(path)

    def is_there(self, path: str) -> bool:
        """Whether a path exists."""
        return os.path.exists(self._place(path))  # noqa: PTH110 (Path is slow)

    def _place(self, path: str) -> str:
        return os.path.join(self.folder, path)  # noqa: PTH118 (Path is slow)

    def _file(self, path: str) -> str:
        # Every folder is listed once, which is much faster than checking every file.
        parent, slash, name = path.rpartition("/")
        inside = self._folder(parent) if parent else ""
        place = inside + slash
        if name not in self._names_in(place):
            name = self._alike_in(place).get(folded(name), name)
        return place + name

    def _folder(self, path: str) -> str:
        if path not in self._spelled:
            self._spelled[path] = path if self.is_there(path) else self._file(path)
        return self._spelled[path]

    def _names_in(self, place: str) -> set[str]:
        if place not in self._names:
            try:
                self._names[place] = set(os.listdir(self._place(place)))  # noqa: PTH208
            except OSError:
                self._names[place] = set()
        return self._names[place]

    def _alike_in(self, place: str) -> dict[str, str]:
        if place not in self._alike:
            names = sorted(self._names_in(place), reverse=True)
            self._alike[place] = {folded(name): name for name in names}
        return self._alike[place]
