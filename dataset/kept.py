"""Where data about image files are stored, under which name, and whether they are up to date.

These data are pixels (cache.py), and which files can be read (readable.py). Nothing here loads
torch.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from dataset.base import ImageSet
from dataset.statuses import known_statuses, statuses
from machine import home
from storage import can_be_made
from utils import InputError


def default_folder() -> Path:
    """The folder of caches without `--cache-dir`, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    base = base or (home() and home() / ".cache")
    if base is None:
        raise InputError(
            "there is no home folder to keep the cache in; name a folder with --cache-dir"
        )
    return Path(base) / "anchorage"


def usual_place() -> Path | None:
    """The `default_folder`; None if it cannot be written: a read-only home, or none at all."""
    try:
        folder = default_folder()
    except InputError:
        return None
    return folder if can_be_made(folder) else None


def name_of(images: ImageSet, *kind: object, size: int | None = None) -> str:
    """The name of the file or folder with data about a data set's images.

    All lists of images in one folder share it: training and evaluation, other draws of the held-out
    classes, the same images and a few more. Each image is found in it by its version.

    Args:
        kind: the kind of data; different kinds have different names. size: shown in the name.
    """
    identity = kind if images.upright else (*kind, "as stored")
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=6)
    digest.update(os.fsencode(_place(images)))
    name = "".join(letter if letter.isalnum() else "-" for letter in images.name)[-40:]
    parts = [name, *([] if size is None else [str(size)]), digest.hexdigest()]
    return "-".join(parts)


def _place(images: ImageSet) -> str:
    """The absolute folder that the paths are relative to; "" if they are absolute.

    It is the same whether the folder is given as `photos`, `.` or `../photos`.
    """
    prefix = images.paths.prefix
    if not prefix and all(map(os.path.isabs, images.paths.names())):
        return prefix
    return os.path.join(os.path.abspath(prefix), "")  # noqa: PTH100, PTH118 (links as they are)


# --- versions -------------------------------------------------------------------------------------

VERSION = np.dtype([("who", np.uint64), ("size", np.int64), ("time", np.int64)])
"""An image and the state of its file: a hash of the image's name and box, the file's size in bytes
and its time in ns (-1 if the file is missing). Data about a version are valid as long as the file
has it."""


def versions_of(images: ImageSet, *, known: bool = False) -> np.ndarray:
    """(N,) of `VERSION`: the current versions of the images.

    Args:
        known: whether statuses that were read before may be used (`known_statuses`).
    """
    now = (known_statuses if known else statuses)(images.paths)
    boxes = [None] * len(images) if images.boxes is None else images.boxes
    found = np.empty(len(images), VERSION)
    found["who"] = [_who(*each) for each in zip(images.paths.names(), boxes, strict=True)]
    found["size"], found["time"] = now["size"], now["time"]
    return found


def _who(name: str, box: np.ndarray | None) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8)
    if box is not None and box[0] >= 0:
        digest.update(b"\0" + box.tobytes())
    return int.from_bytes(digest.digest(), "little")
