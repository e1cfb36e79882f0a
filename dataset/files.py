"""Finding the files of a data set: folders in any letter case, pictures, safe list files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.base import reason
from utils import InputError

logger = logging.getLogger("dataset")

_PHOTOGRAPHS = {".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif"}
_OTHER_PICTURES = {".png", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Pillow alone may not read these; counted all the same, so that they are named and not left out.
_RARE_PICTURES = {".heic", ".heif", ".jxl", ".jp2"}
IMAGE_SUFFIXES = frozenset(_PHOTOGRAPHS | _OTHER_PICTURES | _RARE_PICTURES)


def find_all(folder: Path, relative: str) -> list[Path]:
    """Files and folders at `folder`/`relative`, letter case ignored; an exact match comes first."""
    found = [Path(folder)]
    for part in Path(relative).parts:
        found = [entry for parent in found for entry in _entries_called(parent, part)]
    return found


def find(folder: Path, *relatives: str) -> Path | None:
    """The first of `relatives` that exists in `folder`, letter case ignored; None without one."""
    return next((path for relative in relatives for path in find_all(folder, relative)), None)


def need(folder: Path, *relatives: str) -> Path:
    """As `find`.

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


def is_image(name: str) -> bool:
    """Whether a file name is that of a picture; a hidden file (macOS's "._x.jpg") is none."""
    return not is_hidden(name) and Path(name).suffix.lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's business: ".x", or what macOS leaves in archives."""
    return name.startswith(".") or name == "__MACOSX"


def image_files(folder: Path) -> list[str]:
    """Pictures at any depth under `folder`, as sorted paths relative to it, parts joined by "/"."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        inside = "" if parent == str(folder) else f"{Path(parent).relative_to(folder).as_posix()}/"
        found.extend(f"{inside}{name}" for name in files if is_image(name))
    return sorted(found)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder` in class order (see `in_class_order`)."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    return in_class_order(names)


def in_class_order(names: Iterable[str]) -> list[str]:
    """Class names sorted by number when all of them are whole numbers, else by character code."""
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


def read_rows(path: Path, columns: int, skip: int = 0) -> list[list[str]]:
    """The rows of a list file, split at white space, without its first `skip` lines.

    Raises:
        InputError: the file is missing or no text, or a row does not have `columns` columns.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}); get it again from its source"
        ) from error
    rows = [(number, line.split()) for number, line in enumerate(lines[skip:], skip + 1)]
    for number, row in rows:
        if row and len(row) != columns:
            raise InputError(
                f"{path} line {number} has {len(row)} columns where {columns} belong; "
                "get the file again from its source"
            )
    return [row for _, row in rows if row]


def whole_numbers(texts: Sequence[str], path: Path) -> list[int]:
    """The numbers in a column of the list file `path`; raises InputError where there is none."""
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise InputError(
            f"{path} holds something else where numbers belong ({error}); "
            "get the file again from its source"
        ) from error


def join_words(words: Iterable[object], last: str) -> str:
    """["a", "b", "c"], "or" → "a, b or c"."""
    texts: Sequence[str] = [str(word) for word in words]
    return f" {last} ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)
