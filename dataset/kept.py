"""What is kept of image files beside them: where, under which name, and whether it is still true.

Nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

from dataset.base import ImageSet
from machine import home
from storage import can_be_made
from utils import InputError


def default_folder() -> Path:
    """Where caches go without `--cache-dir`: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    base = base or (home() and home() / ".cache")
    if base is None:
        raise InputError(
            "there is no home folder to keep the cache in; name a folder with --cache-dir"
        )
    return Path(base) / "anchorage"


def usual_place() -> Path | None:
    """The `default_folder`; None where it cannot be written: a read-only home, or none at all."""
    try:
        folder = default_folder()
    except InputError:
        return None
    return folder if can_be_made(folder) else None


def name_of(images: ImageSet, *kind: object, size: int | None = None) -> str:
    """A name of its own for every list of images and boxes, way of decoding, and kind of file.

    Args:
        kind: what else tells one file from another. size: stands in the name, for people.
    """
    told = kind if images.upright else (*kind, "as stored")
    digest = hashlib.blake2b(repr(told).encode(), digest_size=6)
    digest.update(os.fsencode(_place(images)) + b"\0")
    digest.update(b"\0".join(os.fsencode(name) for name in images.paths.names()))
    if images.boxes is not None:
        digest.update(np.ascontiguousarray(images.boxes))
    name = "".join(letter if letter.isalnum() else "-" for letter in images.name)[-40:]
    parts = [name, images.split, *([] if size is None else [str(size)]), digest.hexdigest()]
    return "-".join(parts)


def _place(images: ImageSet) -> str:
    """Where the paths begin, so that the same relative path elsewhere is another one."""
    prefix = images.paths.prefix
    if not prefix and all(map(os.path.isabs, images.paths.names())):
        return prefix
    return os.path.join(os.getcwd(), prefix)  # noqa: PTH109, PTH118 (an absolute prefix as it is)


def stamps_of(images: ImageSet, first: int = 0, stop: int | None = None) -> np.ndarray:
    """(n, 2) int64: size in bytes and time in ns of each source file; -1 for missing ones."""
    stop = len(images) if stop is None else stop
    stamps = np.full((stop - first, 2), -1, np.int64)
    for row, index in enumerate(range(first, stop)):
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(images.paths[index])  # noqa: PTH116 (a Path costs more than stat)
            stamps[row] = status.st_size, status.st_mtime_ns
    return stamps
