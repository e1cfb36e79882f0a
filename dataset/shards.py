"""The files of a cache: shards of a few hundred images.

A shard is two files: the pixels, and a list with the version of every image (kept.py) and the
pixels' checksum. The list is written last. Shards are never changed, so a run that reads them is
not disturbed by another run that adds images.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.base import BadImageError, ImageSet
from dataset.kept import VERSION, versions_of
from dataset.transforms import with_short_side
from machine import cores
from storage import load_arrays, save_arrays, write_atomically
from terminal import notice_if_slow
from utils import DamagedError, InputError


class Shard(NamedTuple):
    """A finished shard: the versions and (n, 2) shapes of n images, 0 for unreadable ones."""

    listing: Path
    versions: np.ndarray
    shapes: np.ndarray
    checksum: int

    @property
    def path(self) -> Path:
        """The file of its pixels."""
        return self.listing.with_suffix(".pixels")

    def starts(self) -> np.ndarray:
        """(n,) where each image begins in the file, in bytes."""
        bytes_ = self.shapes.prod(axis=1) * 3
        return np.cumsum(bytes_) - bytes_

    def map(self) -> np.ndarray:
        """The file's bytes, memory-mapped; never written to."""
        if not self.shapes.any():
            return np.empty(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(self.path, np.uint8, mode="c")

    def read(self, row: int) -> np.ndarray:
        """The image in a row, (H, W, 3); (0, 0, 3) for an unreadable one."""
        start, shape = int(self.starts()[row]), (*self.shapes[row].tolist(), 3)
        return self.map()[start : start + int(np.prod(shape))].reshape(shape)

    def remove(self) -> None:
        """Deletes the shard, the listing first; a run that has mapped it can still use it."""
        for path in (self.listing, self.path):
            path.unlink(missing_ok=True)


def pixels_at(images: ImageSet, index: int, size: int) -> np.ndarray:
    """An image as stored in a shard: (H, W, 3) with short side `size`; (0, 0, 3) if unreadable."""
    try:
        return with_short_side(images.read(index), size)
    except BadImageError:
        return np.empty((0, 0, 3), np.uint8)


def write_shard(folder: Path, versions: Sequence[tuple], pictures: Sequence[np.ndarray]) -> None:
    """Write a new shard of pictures, (H, W, 3) each, to a folder."""
    content = b"".join(np.ascontiguousarray(picture) for picture in pictures)
    parts = {
        "versions": np.array(versions, VERSION),
        "shapes": np.array([picture.shape[:2] for picture in pictures], np.int64),
        "checksum": np.int64(zlib.crc32(content)),
    }
    shard = Shard(folder / f"{secrets.token_hex(8)}.npz", *parts.values())
    write_atomically(shard.path, lambda file: file.write(content))
    save_arrays(shard.listing, parts)


def shards_in(folder: Path) -> list[Shard]:
    """The finished shards of a folder; those with a damaged list are left out."""
    found = []
    for listing in sorted(folder.glob("*.npz")):
        try:
            status = listing.stat()
            found.append(_load(listing, status.st_ino, status.st_mtime_ns))
        except (OSError, InputError):
            # A shard that cannot be read just now is whole: it is not to be made, or removed.
            if listing.exists():
                raise
            # Another run has just removed it.
    return [shard for shard in found if shard is not None]


@lru_cache(maxsize=4096)
def _load(listing: Path, _number: int, _time: int) -> Shard | None:
    """The shard of a list, or None if the list is damaged.

    Lists are never changed: another one of the same name has another inode number or time.
    """
    try:
        parts = load_arrays(listing, "cache")
        versions, shapes, checksum = (parts[name] for name in ("versions", "shapes", "checksum"))
    except (KeyError, DamagedError):
        return None
    fits = versions.dtype == VERSION and shapes.shape == (len(versions), 2)
    if not fits or shapes.dtype.kind not in "iu" or (shapes < 0).any():
        return None
    if checksum.shape or checksum.dtype.kind not in "iu":
        return None
    return Shard(listing, versions, shapes, int(checksum))


# --- finding images in shards ---------------------------------------------------------------------

_Rows = dict[tuple[int, int, int], tuple[int, int]]  # version → number of a shard, row in it


def rows_of(shards: Sequence[Shard]) -> _Rows:
    """The place of each version; if several shards have it, one where it is readable."""
    rows: _Rows = {}
    for number, shard in enumerate(shards):
        known = zip(shard.versions.tolist(), shard.shapes[:, 0].tolist(), strict=True)
        for row, (version, height) in enumerate(known):
            if height or version not in rows:
                rows[version] = number, row
    return rows


def places_of(images: ImageSet, shards: Sequence[Shard]) -> np.ndarray:
    """(N, 2) the shard and row of the current version of each image; -1 if there is none."""
    rows = rows_of(shards)
    places = [rows.get(version, (-1, -1)) for version in versions_of(images).tolist()]
    return np.array(places, np.int64).reshape(-1, 2)


def used(shards: Sequence[Shard], places: np.ndarray) -> list[Shard]:
    """The shards that are used at these places."""
    return [shards[number] for number in np.unique(places[:, 0]).tolist() if number >= 0]


_verified: set[tuple] = set()


def damaged(shards: Sequence[Shard]) -> list[Shard]:
    """The shards whose pixels differ from their checksum; checked once per process."""

    def intact(shard: Shard) -> bool:
        try:
            status = shard.path.stat()
            name = (str(shard.path), status.st_ino, status.st_mtime_ns, shard.checksum)
            if name not in _verified and zlib.crc32(shard.map()) == shard.checksum:
                _verified.add(name)
        except (FileNotFoundError, ValueError):  # it is gone, or empty
            return False
        return name in _verified

    gigabytes = sum(int(shard.shapes.prod(axis=1).sum()) for shard in shards) * 3e-9
    with (
        notice_if_slow(f"checking the cache, {gigabytes:.1f} GB"),
        ThreadPoolExecutor(cores()) as pool,
    ):
        fine = list(pool.map(intact, shards))
    return [shard for shard, whole in zip(shards, fine, strict=True) if not whole]
