"""Pixels of decoded image files, kept on disk: `--decode cache`.

Every image is decoded once, its short side brought to `--cache-size` pixels, and written as uint8
into shards of some hundred images that are memory-mapped afterwards. With the evaluation's own
short side (256) the evaluation sees exactly what decoding each file would give it; training crops
come from the smaller image.

A shard is two files: the pixels, and a list with the size and time of every source file and the
pixels' checksum, which is written last. So a killed build goes on where it stopped, a changed
source file costs one shard, and a shard that is damaged is made anew. A lock lets a second run wait
for the first one's build.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.base import BadImageError, ImageSet, reason
from dataset.decoding import LONGEST, need_file
from dataset.files import told_logger
from dataset.kept import default_folder, name_of, stamps_of
from dataset.transforms import PixelStore, with_short_side
from dataset.workers import deaths_told, with_workers
from machine import cores
from storage import load_arrays, need_room, save_arrays, write_atomically
from terminal import told
from utils import InputError

logger = logging.getLogger("dataset")

SHARD = 256  # images; what a kill can cost each core
MAPPED = 128  # shards that are open at a time; a process may often have no more than 256 files
_FORMAT = 2  # 1: pictures of any length, and 32 bits or 12 in 16 as if they were full 16


class Cache:
    """The pixels of an image set, each with its short side at `size`; what `open_cache` gives."""

    def __init__(self, images: ImageSet, size: int, shards: list[_Shard]) -> None:
        self.images = images
        self.size = size
        self.shapes = np.concatenate([shard.shapes for shard in shards])
        self._shards = shards
        self._starts = np.concatenate([shard.starts() for shard in shards])
        # A mapped file is an open one. Mapping one again costs far less than cutting an image.
        self._pixels = lru_cache(MAPPED)(lambda number: shards[number].map())

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8 RGB.

        Raises:
            BadImageError: it could not be decoded when the cache was made, and still cannot.
        """
        height, width = self.shapes[index].tolist()
        if not height:
            return with_short_side(self.images.read(index), self.size)
        start = int(self._starts[index])
        pixels = self._pixels(index // SHARD)[start : start + height * width * 3]
        return pixels.reshape(height, width, 3)

    def on_device(self, device: torch.device) -> PixelStore:
        """All pixels in the device's memory; raises InputError when they do not fit."""
        needed = int(self.shapes.prod(axis=1).sum()) * 3
        check_room(needed, device, self.images)
        store = torch.empty(needed, dtype=torch.uint8, device=device)
        start = 0
        for shard in self._shards:
            pixels = shard.map()
            store[start : start + len(pixels)] = torch.from_numpy(pixels)
            start += len(pixels)
        return PixelStore(store.view(-1, 3), self.shapes)


def check_room(needed: int, device: torch.device, images: ImageSet) -> None:
    """Raises InputError where the pixels of a cache do not fit into the GPU's memory."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    # torch keeps what a step or an evaluation has given back, and uses it for what comes next.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise InputError(
            f"the {len(images):,} cached images of {images.name} {images.split} take "
            f"{needed / 2**30:.1f} GiB and the GPU has {free / 2**30:.1f} of {total / 2**30:.1f} "
            "GiB free; use --data-device cpu or a smaller --cache-size"
        )


# --- shards ---------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """One shard to be: which images, where."""

    folder: Path
    number: int
    size: int
    first: int
    stop: int

    @property
    def pixels(self) -> Path:
        return self.folder / f"{self.number:05d}.pixels"

    @property
    def listing(self) -> Path:
        return self.folder / f"{self.number:05d}.npz"


class _Shard(NamedTuple):
    """A finished shard: (n, 2) shapes, 0 for images that could not be decoded."""

    path: Path
    shapes: np.ndarray
    checksum: int

    def starts(self) -> np.ndarray:
        """(n,) where each image begins in the file, in bytes."""
        bytes_ = self.shapes.prod(axis=1) * 3
        return np.cumsum(bytes_) - bytes_

    def map(self) -> np.ndarray:
        """The file's bytes; private to the process where written to, which nobody does."""
        if not self.shapes.any():
            return np.empty(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(self.path, np.uint8, mode="c")


def _load(task: _Task, images: ImageSet) -> _Shard | None:
    """The shard of a task if it is finished and up to date."""
    try:
        listing = load_arrays(task.listing, "cache")
        stamps, shapes, checksum = (listing[name] for name in ("stamps", "shapes", "checksum"))
        length = task.pixels.stat().st_size
    except (OSError, KeyError, InputError):
        return None
    fits = shapes.shape == (task.stop - task.first, 2) and shapes.dtype.kind in "iu"
    if not fits or (shapes < 0).any() or checksum.shape or checksum.dtype.kind not in "iu":
        return None
    if not np.array_equal(stamps, stamps_of(images, task.first, task.stop)):
        return None
    shard = _Shard(task.pixels, shapes, int(checksum))
    return shard if length == shapes.prod(axis=1).sum() * 3 else None


def _build(task: _Task, images: ImageSet) -> None:
    """Decodes the images of a task and writes their shard, the listing last."""
    stamps = stamps_of(images, task.first, task.stop)
    shapes = np.zeros((task.stop - task.first, 2), np.int64)
    pixels = io.BytesIO()
    for row, index in enumerate(range(task.first, task.stop)):
        with contextlib.suppress(BadImageError):
            image = with_short_side(images.read(index), task.size)
            shapes[row] = image.shape[:2]
            pixels.write(np.ascontiguousarray(image))
    content = pixels.getbuffer()
    write_atomically(task.pixels, lambda file: file.write(content))
    parts = {"stamps": stamps, "shapes": shapes, "checksum": np.int64(zlib.crc32(content))}
    save_arrays(task.listing, parts)


# --- building and opening -------------------------------------------------------------------------

_verified: set[tuple] = set()


def open_cache(images: ImageSet, size: int = 256, folder: str | Path | None = None) -> Cache:
    """The cache of an image set, made or brought up to date first.

    Args:
        size: short side of the kept images in pixels. folder: where caches are kept.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder or default_folder())
    folder /= name_of(images, _FORMAT, SHARD, size, size=size)
    stops = [*range(SHARD, len(images), SHARD), len(images)]
    tasks = [_Task(folder, number, size, number * SHARD, stop) for number, stop in enumerate(stops)]
    shards = [_load(task, images) for task in tasks]
    if None in shards or not all(_verify(shards)):
        with _lock(folder):
            shards = _complete(tasks, images)
    return Cache(images, size, shards)


def _verify(shards: list[_Shard]) -> list[bool]:
    """Whether the pixels of each shard are those that were written; once in a process."""

    def intact(shard: _Shard) -> bool:
        status = shard.path.stat()
        name = (str(shard.path), status.st_ino, status.st_mtime_ns, shard.checksum)
        if name not in _verified and zlib.crc32(shard.map()) == shard.checksum:
            _verified.add(name)
        return name in _verified

    gigabytes = sum(int(shard.shapes.prod(axis=1).sum()) for shard in shards) * 3e-9
    with told(f"checking the cache, {gigabytes:.1f} GB"), ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(intact, shards))


def _complete(tasks: list[_Task], images: ImageSet) -> list[_Shard]:
    """Builds what is missing, out of date or damaged; another run may just have done so."""
    found = [_load(task, images) for task in tasks]
    present = [shard for shard in found if shard is not None]
    damaged = {
        shard.path for shard, intact in zip(present, _verify(present), strict=True) if not intact
    }
    for path in sorted(damaged):
        logger.warning("%s is damaged and is made anew", path)
    wanted = [
        task
        for task, shard in zip(tasks, found, strict=True)
        if shard is None or shard.path in damaged
    ]
    _build_all(wanted, images)
    shards = [_load(task, images) for task in tasks]
    lost = next((task for task, shard in zip(tasks, shards, strict=True) if shard is None), None)
    if lost is not None:
        raise InputError(
            f"images between {images.paths[lost.first]} and {images.paths[lost.stop - 1]} changed "
            "while they were cached; start again when nothing writes to them"
        )
    return shards


def bytes_of_one(images: ImageSet, size: int, sample: int = 64) -> float:
    """How much the cache keeps of one image, by the proportions of some: their headers are read."""
    longer = []
    for index in np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int).tolist():
        with contextlib.suppress(Exception):  # what cannot be read is told elsewhere
            need_file(images.paths[index])
            with Image.open(images.paths[index]) as image:
                longer.append(min(LONGEST, max(image.size) / min(image.size)))
    return 3 * size**2 * (float(np.mean(longer)) if longer else 4 / 3)


class _Builder(Dataset):
    """Builds one shard an item; gives the number of its images, or what went wrong.

    A Dataset, because a DataLoader's workers go away when their parent is killed, and their death
    is noticed.
    """

    def __init__(self, tasks: list[_Task], images: ImageSet) -> None:
        self.tasks = tasks
        self.images = images

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, position: int) -> int | InputError:
        task = self.tasks[position]
        try:
            _build(task, self.images)
        except InputError as error:
            return error
        return task.stop - task.first


def _build_all(tasks: list[_Task], images: ImageSet) -> None:
    if not tasks:
        return
    total = sum(task.stop - task.first for task in tasks)
    needed = total * bytes_of_one(images, tasks[0].size)
    advice = "choose another --cache-dir, a smaller --cache-size or --decode exact"
    room = need_room(tasks[0].folder, needed, f"the cache of {total:,} images", advice)
    told_logger.info("decoding %s images once into %s: %s", f"{total:,}", tasks[0].folder, room)
    built = with_workers(_Builder(tasks, images), min(cores(), len(tasks)))
    bar = tqdm(total=total, desc="cache", unit="img", leave=False, disable=None)
    with bar, deaths_told("; start again, and the cache is continued"):
        for outcome in built:
            if isinstance(outcome, InputError):
                raise outcome
            bar.update(outcome)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; a process that dies lets go of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(
            f"the cache folder {folder} cannot be written ({reason(error)}); "
            "choose another one with --cache-dir, or use --decode exact"
        ) from error
    with file:
        # lockf and not flock: workers do not inherit it, so it ends with this process.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.warning("another run makes the cache %s; waiting for it", folder)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield
