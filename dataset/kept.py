"""What is kept of image files beside them: where, under which name, and whether it is still true.

Nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from dataset.base import ImageSet
from dataset.statuses import statuses
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
    """What the file or folder is called in which something is kept of a data set's images.

    All lists of images that lie in one place share it (training and evaluation, other draws of the
    held-out classes, the same images and a few more); each image is found by its version.

    Args:
        kind: what else tells one file from another. size: stands in the name, for people.
    """
    told = kind if images.upright else (*kind, "as stored")
    digest = hashlib.blake2b(repr(told).encode(), digest_size=6)
    digest.update(os.fsencode(_place(images)))
    name = "".join(letter if letter.isalnum() else "-" for letter in images.name)[-40:]
    parts = [name, *([] if size is None else [str(size)]), digest.hexdigest()]
    return "-".join(parts)


def _place(images: ImageSet) -> str:
    """Where the paths begin, so that the same relative path elsewhere is another one.

    However the folder is called from where this process runs: `photos`, `.` and `../photos`.
    """
    prefix = images.paths.prefix
    if not prefix and all(map(os.path.isabs, images.paths.names())):
        return prefix
    return os.path.join(os.path.abspath(prefix), "")  # noqa: PTH100, PTH118 (links as they are)


# --- versions -------------------------------------------------------------------------------------

VERSION = np.dtype([("who", np.uint64), ("size", np.int64), ("time", np.int64)])
"""An image as its file was once: a hash of its name and box, and the file's size in bytes and time
in ns, -1 where it is missing. What was found out of a version holds as long as it is the file's."""


def versions_of(images: ImageSet) -> np.ndarray:
    """(N,) of `VERSION`: the images as their files are now."""
    boxes = [None] * len(images) if images.boxes is None else images.boxes
    found = zip(images.paths.names(), boxes, statuses(images.paths), strict=True)
    return np.array([(_who(name, box), *_size_and_time(now)) for name, box, now in found], VERSION)


def _who(name: str, box: np.ndarray | None) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8)
    if box is not None and box[0] >= 0:
        digest.update(b"\0" + box.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _size_and_time(status: os.stat_result | None) -> tuple[int, int]:
    return (-1, -1) if status is None else (status.st_size, status.st_mtime_ns)
