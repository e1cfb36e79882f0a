"""Pixels of decoded image files, kept on disk: `--decode cache`.

Every image is decoded once, its short side brought to `--cache-size` pixels, and written as uint8
into shards of some hundred images that are memory-mapped afterwards. With the evaluation's own
short side (256) the evaluation sees exactly what decoding each file would give it; training crops
come from the smaller image.

A shard is two files: the pixels, and a list with the version of every image (kept.py) and the
pixels' checksum, which is written last. A shard is never written again, so a run that reads it is
not disturbed by one that adds images. All lists of images in one place share their shards: only an
image that is new or has changed is decoded, into a new shard, and old shards with few images that
are of use are packed into it. A killed build goes on where it stopped, and a shard that is damaged
is made anew. A lock lets a second run wait for the first one's build.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from bars import Bar
from dataset.base import BadImageError, ImageSet, reason, why_unreadable
from dataset.decoding import LONGEST, need_file
from dataset.files import told_logger
from dataset.kept import VERSION, default_folder, name_of, versions_of
from dataset.pixel_store import PixelStore
from dataset.transforms import with_short_side
from dataset.workers import deaths_told, with_workers
from machine import cores
from storage import load_arrays, lock, need_room, save_arrays, write_atomically
from terminal import told
from utils import InputError, counted

logger = logging.getLogger("dataset")

SHARD = 256  # images; what a kill can cost each core
MAPPED = 128  # shards that are open at a time; a process may often have no more than 256 files
_FORMAT = 3  # 2: a folder for each list of images


class Cache:
    """The pixels of an image set, each with its short side at `size`; what `open_cache` gives.

    Args:
        places: (N, 2) the number of the shard, and the row in it, of each image.
    """

    def __init__(
        self, images: ImageSet, size: int, shards: Sequence[_Shard], places: np.ndarray
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
        # A mapped file is an open one. Mapping one again costs far less than cutting an image.
        self._pixels = lru_cache(MAPPED)(lambda number: shards[number].map())
        for number in np.unique(self._shard)[:MAPPED].tolist():
            with contextlib.suppress(FileNotFoundError):
                self._pixels(number)  # so that it stays when another run removes it

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
            InputError: they do not fit; or what is not kept any more is not as it was.
        """
        ends = np.cumsum(self.shapes.prod(axis=1) * 3)
        check_room(int(ends[-1]), device, self.images)
        store = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
        end = 0
        for first, last in self._runs():
            pixels = self._kept(first, last)
            if pixels is None:
                pixels = np.concatenate([self._as_it_was(each) for each in range(first, last + 1)])
            start, end = end, int(ends[last])
            store[start:end] = torch.from_numpy(pixels)
        return PixelStore(store.view(-1, 3), self.shapes)

    def _kept(self, first: int, last: int) -> np.ndarray | None:
        """The bytes of the images `first` to `last`, which lie one behind the other in a shard.

        None where the shard is gone: another run has packed it into a new one before it was opened
        here.
        """
        try:
            pixels = self._pixels(int(self._shard[first]))
        except FileNotFoundError:
            return None
        return pixels[self._starts[first] : self._starts[last] + self.shapes[last].prod() * 3]

    def _as_it_was(self, index: int) -> np.ndarray:
        """The bytes of an image, decoded anew; raises InputError where its shape is another."""
        if not self.shapes[index].any():
            return np.empty(0, np.uint8)
        picture = _decoded(self.images, index, self.size)
        if picture.shape[:2] != tuple(self.shapes[index]):
            raise InputError(_changed(self.images.paths[index]))
        return picture.reshape(-1)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """The first and the last of images that lie one behind the other in a shard."""
        apart = (np.diff(self._shard) != 0) | (np.diff(self._row) != 1)
        ends = np.flatnonzero(np.r_[apart, True])
        return zip(np.r_[0, ends[:-1] + 1].tolist(), ends.tolist(), strict=True)


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


class _Shard(NamedTuple):
    """A finished shard: the versions of its n images, (n, 2) shapes, 0 for what is no picture."""

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
        """The file's bytes; private to the process where written to, which nobody does."""
        if not self.shapes.any():
            return np.empty(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(self.path, np.uint8, mode="c")

    def read(self, row: int) -> np.ndarray:
        """The image in a row, as (H, W, 3); (0, 0, 3) for what is no picture."""
        start, shape = int(self.starts()[row]), (*self.shapes[row].tolist(), 3)
        return self.map()[start : start + int(np.prod(shape))].reshape(shape)

    def remove(self) -> None:
        """Deletes it, the listing first; a run that has it mapped goes on with it."""
        for path in (self.listing, self.path):
            path.unlink(missing_ok=True)


def _shards_in(folder: Path) -> list[_Shard]:
    found = []
    for listing in sorted(folder.glob("*.npz")):
        with contextlib.suppress(OSError):  # another run has just removed it
            status = listing.stat()
            found.append(_load(listing, status.st_ino, status.st_mtime_ns))
    return [shard for shard in found if shard is not None]


@lru_cache(maxsize=4096)
def _load(listing: Path, _number: int, _time: int) -> _Shard | None:
    """The shard of a list, None where the list is damaged.

    A list is never changed: another one of the same name has another inode number or time.
    """
    try:
        parts = load_arrays(listing, "cache")
        versions, shapes, checksum = (parts[name] for name in ("versions", "shapes", "checksum"))
    except (OSError, KeyError, InputError):
        return None
    fits = versions.dtype == VERSION and shapes.shape == (len(versions), 2)
    if not fits or shapes.dtype.kind not in "iu" or (shapes < 0).any():
        return None
    if checksum.shape or checksum.dtype.kind not in "iu":
        return None
    return _Shard(listing, versions, shapes, int(checksum))


_Rows = dict[tuple[int, int, int], tuple[int, int]]  # version → number of a shard, row in it


def _rows_of(shards: Sequence[_Shard]) -> _Rows:
    """Where each version is; in several shards, where it is a picture."""
    rows: _Rows = {}
    for number, shard in enumerate(shards):
        known = zip(shard.versions.tolist(), shard.shapes[:, 0].tolist(), strict=True)
        for row, (version, height) in enumerate(known):
            if height or version not in rows:
                rows[version] = number, row
    return rows


def _places(images: ImageSet, shards: Sequence[_Shard]) -> np.ndarray:
    """(N, 2) the shard and the row that hold each image as its file is now; -1 for none."""
    rows = _rows_of(shards)
    places = [rows.get(version, (-1, -1)) for version in versions_of(images).tolist()]
    return np.array(places, np.int64).reshape(-1, 2)


class _Task(NamedTuple):
    """One shard to be: images that are decoded, and rows of older shards."""

    folder: Path
    size: int
    new: Sequence[int]
    kept: Sequence[tuple[_Shard, int]]


def _build(task: _Task, images: ImageSet) -> None:
    """Makes the shard of a task and writes it, the listing last."""
    versions = versions_of(images.subset(task.new)).tolist()  # as they are before they are read
    pictures = [_decoded(images, index, task.size) for index in task.new]
    versions += [tuple(shard.versions[row].tolist()) for shard, row in task.kept]
    pictures += [shard.read(row) for shard, row in task.kept]
    content = b"".join(np.ascontiguousarray(picture) for picture in pictures)
    parts = {
        "versions": np.array(versions, VERSION),
        "shapes": np.array([picture.shape[:2] for picture in pictures], np.int64),
        "checksum": np.int64(zlib.crc32(content)),
    }
    shard = _Shard(task.folder / f"{secrets.token_hex(8)}.npz", *parts.values())
    write_atomically(shard.path, lambda file: file.write(content))
    save_arrays(shard.listing, parts)


def _decoded(images: ImageSet, index: int, size: int) -> np.ndarray:
    try:
        return with_short_side(images.read(index), size)
    except BadImageError:
        return np.empty((0, 0, 3), np.uint8)


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
    folder /= name_of(images, _FORMAT, size, size=size)
    shards = _shards_in(folder)
    places = _places(images, shards)
    mended = _mended(images, shards, places)
    if mended or (places < 0).any() or _damaged(_used(shards, places)):
        with _lock(folder):
            shards, places = _complete(images, size, folder, mended)
    return Cache(images, size, shards, places)


def _mended(images: ImageSet, shards: Sequence[_Shard], places: np.ndarray) -> list[int]:
    """Images that could not be read when the cache was made, and now can be, from the same files.

    A disk may have been away, or a package that reads their format may be installed since.
    """
    held = zip(range(len(images)), *places.T.tolist(), strict=True)
    failed = [
        index for index, shard, row in held if shard >= 0 and not shards[shard].shapes[row, 0]
    ]
    return [index for index in failed if why_unreadable(images, index) is None]


def _used(shards: Sequence[_Shard], places: np.ndarray) -> list[_Shard]:
    return [shards[number] for number in np.unique(places[:, 0]).tolist() if number >= 0]


def _damaged(shards: Sequence[_Shard]) -> list[_Shard]:
    """The shards whose pixels are not as they were written; a process checks each of them once."""

    def intact(shard: _Shard) -> bool:
        try:
            status = shard.path.stat()
            name = (str(shard.path), status.st_ino, status.st_mtime_ns, shard.checksum)
            if name not in _verified and zlib.crc32(shard.map()) == shard.checksum:
                _verified.add(name)
        except (OSError, ValueError):  # it is gone, or empty
            return False
        return name in _verified

    gigabytes = sum(int(shard.shapes.prod(axis=1).sum()) for shard in shards) * 3e-9
    with told(f"checking the cache, {gigabytes:.1f} GB"), ThreadPoolExecutor(cores()) as pool:
        fine = list(pool.map(intact, shards))
    return [shard for shard, whole in zip(shards, fine, strict=True) if not whole]


def _complete(
    images: ImageSet, size: int, folder: Path, mended: Sequence[int]
) -> tuple[Sequence[_Shard], np.ndarray]:
    """Builds what is missing, out of date, damaged or mended, unless another run just has.

    Returns:
        the shards, and the places of the images in them.
    """
    shards = _shards_in(folder)
    shards = _without_damage(shards, _used(shards, _places(images, shards)))
    _remove_remains(folder, shards)
    missing = np.flatnonzero(_places(images, shards)[:, 0] < 0).tolist()
    wanted = _each_once(images, [*missing, *mended])
    if wanted:
        live = _live_rows(shards, images, wanted)
        for shard in shards:
            if not live[shard.path]:
                shard.remove()
        few = [shard for shard in shards if 0 < len(live[shard.path]) < SHARD // 2]
        few = _without_damage(few, few)
        kept = [(shard, row) for shard in few for row in live[shard.path]]
        _build_all(_tasks(folder, size, wanted, kept), images)
        for shard in few:
            shard.remove()
        shards = _shards_in(folder)
    places = _places(images, shards)
    lost = np.flatnonzero(places[:, 0] < 0).tolist()
    if lost:
        raise InputError(_changed(images.paths[lost[0]]))
    return shards, places


def _changed(path: str) -> str:
    return f"{path} changed while it was cached; start again when nothing writes to the images"


def _without_damage(shards: Sequence[_Shard], looked_at: Sequence[_Shard]) -> list[_Shard]:
    """The shards but for those that are damaged, which are removed."""
    damaged = {shard.path: shard for shard in _damaged(looked_at)}
    for path, shard in sorted(damaged.items()):
        logger.warning("%s is damaged and will be made again", path)
        shard.remove()
    return [shard for shard in shards if shard.path not in damaged]


def _remove_remains(folder: Path, shards: Sequence[_Shard]) -> None:
    """Removes what killed builds have left beside the shards."""
    whole = {path for shard in shards for path in (shard.listing, shard.path)}
    for path in folder.iterdir():
        if path not in whole and path.name != _LOCK:
            path.unlink()


def _each_once(images: ImageSet, indices: Sequence[int]) -> list[int]:
    """The indices in order; of an image that is listed more than once, the first."""
    indices = sorted(set(indices))
    first: dict[tuple, int] = {}
    for index, version in zip(indices, versions_of(images.subset(indices)).tolist(), strict=True):
        first.setdefault(version, index)
    return list(first.values())


def _live_rows(
    shards: Sequence[_Shard], images: ImageSet, wanted: Sequence[int]
) -> dict[Path, list[int]]:
    """The rows of each shard that are still of use, by the file of its pixels.

    Of no use are older versions of these images, images that are to be decoded anew, and what
    another shard holds as well. Other images of the same place keep their rows.
    """
    now = versions_of(images)
    anew = set(now[wanted].tolist())
    current, known = set(now.tolist()) - anew, set(now["who"].tolist())
    rows = _rows_of(shards)
    return {
        shard.path: [
            row
            for row, version in enumerate(shard.versions.tolist())
            if rows[version] == (number, row) and (version in current or version[0] not in known)
        ]
        for number, shard in enumerate(shards)
    }


def _tasks(
    folder: Path, size: int, new: Sequence[int], kept: Sequence[tuple[_Shard, int]]
) -> list[_Task]:
    """The shards to be, full ones but for the last: what is new, and then what is kept."""

    def task(start: int) -> _Task:
        first, last = (max(0, place - len(new)) for place in (start, start + SHARD))
        return _Task(folder, size, new[start : start + SHARD], kept[first:last])

    return [task(start) for start in range(0, len(new) + len(kept), SHARD)]


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

    def __init__(self, tasks: Sequence[_Task], images: ImageSet) -> None:
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
        return len(task.new)


def _build_all(tasks: Sequence[_Task], images: ImageSet) -> None:
    folder, size = tasks[0].folder, tasks[0].size
    new = images.subset([index for task in tasks for index in task.new])
    advice = "choose another --cache-dir, a smaller --cache-size or --decode exact"
    room = need_room(
        folder, len(new) * bytes_of_one(new, size), f"the cache of {counted(len(new))}", advice
    )
    told_logger.info("decoding %s once into %s: %s", counted(len(new)), folder, room)
    built = with_workers(_Builder(tasks, images), min(cores(), len(tasks)))
    with Bar("cache", len(new)) as bar, deaths_told("; start again, and the cache is continued"):
        for outcome in built:
            if isinstance(outcome, InputError):
                raise outcome
            bar.update(outcome)


_LOCK = "lock"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; a process that dies lets go of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"the cache folder {folder} cannot be written ({reason(error)}); "
            "choose another one with --cache-dir, or use --decode exact"
        ) from error
    with file:
        if not lock(file, folder):
            logger.warning("another run makes the cache %s; waiting for it", folder)
            lock(file, folder, wait=True)
        yield
