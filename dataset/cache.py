"""A cache of decoded images on disk: `--decode cache`.

Every image is decoded once, its short side is resized to `--cache-size` pixels, and it is written
as uint8 into shards (shards.py, shard_building.py), which are memory-mapped later. If that is the
evaluation's short side (256), evaluation gets exactly the pixels that decoding every file would
give; training crops are cut from the resized image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from dataset.base import ImageSet, why_unreadable
from dataset.kept import default_folder, name_of
from dataset.pixel_store import PixelStore
from dataset.shard_building import changed, update
from dataset.shards import Shard, damaged, pixels_at, places_of, shards_in, used
from dataset.transforms import with_short_side
from utils import InputError

MAPPED = 128  # shards that are open at a time; many processes may only have 256 open files
_FORMAT = 3  # 2 had a folder for each list of images


def open_cache(images: ImageSet, size: int = 256, folder: str | Path | None = None) -> Cache:
    """The cache of an image set, which is first made or updated.

    Args:
        size: short side of the cached images in pixels. folder: where caches are stored.

    Raises:
        MachineError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder or default_folder())
    folder /= name_of(images, _FORMAT, size, size=size)
    shards = shards_in(folder)
    places = places_of(images, shards)
    repaired = _readable_now(images, shards, places)
    if repaired or (places < 0).any() or damaged(used(shards, places)):
        shards, places = update(folder, images, size, repaired)
    return Cache(images, size, shards, places)


def _readable_now(images: ImageSet, shards: Sequence[Shard], places: np.ndarray) -> list[int]:
    """Images that could not be read when the cache was made, but now can, from the same files.

    A disk may have been offline, or a package for their format may have been installed since.
    """
    placed = zip(range(len(images)), *places.T.tolist(), strict=True)
    failed = [
        index for index, shard, row in placed if shard >= 0 and not shards[shard].shapes[row, 0]
    ]
    return [index for index in failed if why_unreadable(images, index) is None]


class Cache:
    """The cached pixels of an image set; `open_cache` makes one.

    Args:
        size: the short side of each image in pixels.
        places: (N, 2) the number of each image's shard, and its row there.
    """

    def __init__(
        self, images: ImageSet, size: int, shards: Sequence[Shard], places: np.ndarray
    ) -> None:
        self.images = images
        self.size = size
        self.shapes = np.zeros((len(images), 2), np.int64)
        self._starts = np.zeros(len(images), np.int64)
        self._shard, self._row = places.T
        for number in np.unique(self._shard).tolist():
            here = self._shard == number
            self.shapes[here] = shards[number].shapes[self._row[here]]
            self._starts[here] = shards[number].starts()[self._row[here]]
        # A mapped file counts as open. Mapping it again takes far less time than cutting an image.
        self._pixels = lru_cache(MAPPED)(lambda number: shards[number].map())
        for number in np.unique(self._shard)[:MAPPED].tolist():
            with contextlib.suppress(FileNotFoundError):
                self._pixels(number)  # a mapped shard stays readable if another run removes it

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8 RGB.

        Raises:
            BadImageError: it could not be decoded when the cache was made, and still cannot.
        """
        height, width = self.shapes[index].tolist()
        pixels = self._kept(index, index) if height else None
        if pixels is None:
            return with_short_side(self.images.read(index), self.size)
        return pixels.reshape(height, width, 3)

    def on_device(self, device: torch.device) -> PixelStore:
        """All pixels in the device's memory.

        Raises:
            InputError: they do not fit; or a shard is gone and a file of its images has changed.
        """
        ends = np.cumsum(self.shapes.prod(axis=1) * 3)
        check_room(int(ends[-1]), device, self.images)
        store = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
        end = 0
        for first, last in self._runs():
            pixels = self._kept(first, last)
            if pixels is None:
                again = [self._decoded_again(each) for each in range(first, last + 1)]
                pixels = np.concatenate(again)
            start, end = end, int(ends[last])
            store[start:end] = torch.from_numpy(pixels)
        return PixelStore(store.view(-1, 3), self.shapes)

    def _kept(self, first: int, last: int) -> np.ndarray | None:
        """The bytes of the images `first` to `last`, which are consecutive in a shard.

        None if the shard is gone, because another run packed it into a new one before this one
        opened it.
        """
        try:
            pixels = self._pixels(int(self._shard[first]))
        except FileNotFoundError:
            return None
        return pixels[self._starts[first] : self._starts[last] + self.shapes[last].prod() * 3]

    def _decoded_again(self, index: int) -> np.ndarray:
        """The bytes of an image, decoded again; raises InputError if its shape has changed."""
        if not self.shapes[index].any():
            return np.empty(0, np.uint8)
        picture = pixels_at(self.images, index, self.size)
        if picture.shape[:2] != tuple(self.shapes[index]):
            raise changed(self.images.paths[index])
        return picture.reshape(-1)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """The first and the last image of every run of images that are consecutive in a shard."""
        apart = (np.diff(self._shard) != 0) | (np.diff(self._row) != 1)
        ends = np.flatnonzero(np.r_[apart, True])
        return zip(np.r_[0, ends[:-1] + 1].tolist(), ends.tolist(), strict=True)


def check_room(needed: int, device: torch.device, images: ImageSet) -> None:
    """Raise InputError if the pixels of a cache do not fit into the GPU's memory."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    # torch keeps freed memory reserved and uses it again, so it counts as free.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise InputError(
            f"the {len(images):,} cached images of {images.name} {images.split} take "
            f"{needed / 2**30:.1f} GiB and the GPU has {free / 2**30:.1f} of {total / 2**30:.1f} "
            "GiB free; use --data-device cpu or a smaller --cache-size"
        )
