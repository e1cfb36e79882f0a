"""Makes and updates the shards of a cache.

All lists of images in one folder share their shards. Only new and changed images are decoded, into
new shards, and old shards with few images in use are merged into these. A killed build is continued
by the next one, and a damaged shard is made again. A lock makes a second run wait for the build of
the first.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bars import Bar
from dataset.base import ImageSet
from dataset.decoding import LONGEST, need_file
from dataset.files import announcements
from dataset.kept import versions_of
from dataset.shards import (
    Shard,
    damaged,
    pixels_at,
    places_of,
    rows_of,
    shards_in,
    used,
    write_shard,
)
from dataset.workers import item_loader, worker_deaths_in_words
from machine import cores
from storage import lock, need_room
from utils import InputError, counted, not_written

logger = logging.getLogger("dataset")

SHARD = 256  # images; a kill loses at most so many per core
_LOCK = "lock"


def update(
    folder: Path, images: ImageSet, size: int, repaired: Sequence[int]
) -> tuple[Sequence[Shard], np.ndarray]:
    """Build missing, outdated and damaged shards, unless another run just did.

    Args:
        size: short side of the cached images in pixels. repaired: images that could not be read
            before, and are decoded again.

    Returns:
        The shards, and the places of the images in them.

    Raises:
        MachineError: the folder cannot be written, or the disk is full.
        InputError: an image changed meanwhile.
    """
    with _lock(folder):
        return _complete(folder, images, size, repaired)


def _complete(
    folder: Path, images: ImageSet, size: int, repaired: Sequence[int]
) -> tuple[Sequence[Shard], np.ndarray]:
    shards = shards_in(folder)
    shards = _without_damage(shards, used(shards, places_of(images, shards)))
    _remove_remains(folder, shards)
    missing = np.flatnonzero(places_of(images, shards)[:, 0] < 0).tolist()
    wanted = _each_once(images, [*missing, *repaired])
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
        shards = shards_in(folder)
    places = places_of(images, shards)
    for index in np.flatnonzero(places[:, 0] < 0).tolist():
        raise changed(images.paths[index])
    return shards, places


def changed(path: str) -> InputError:
    """The error for an image that changed after it was cached."""
    return InputError(
        f"{path} changed while it was cached; start again when nothing writes to the images"
    )


def _without_damage(shards: Sequence[Shard], looked_at: Sequence[Shard]) -> list[Shard]:
    """The shards without damaged ones, which are deleted."""
    bad = {shard.path: shard for shard in damaged(looked_at)}
    for path, shard in sorted(bad.items()):
        logger.warning("%s is damaged and will be made again", path)
        shard.remove()
    return [shard for shard in shards if shard.path not in bad]


def _remove_remains(folder: Path, shards: Sequence[Shard]) -> None:
    """Delete leftovers of killed builds."""
    whole = {path for shard in shards for path in (shard.listing, shard.path)}
    for path in folder.iterdir():
        if path not in whole and path.name != _LOCK:
            path.unlink()


def _each_once(images: ImageSet, indices: Sequence[int]) -> list[int]:
    """The indices in order, without repetitions of the same image."""
    indices = sorted(set(indices))
    first: dict[tuple, int] = {}
    for index, version in zip(indices, versions_of(images.subset(indices)).tolist(), strict=True):
        first.setdefault(version, index)
    return list(first.values())


def _live_rows(
    shards: Sequence[Shard], images: ImageSet, wanted: Sequence[int]
) -> dict[Path, list[int]]:
    """The rows of each shard that are still used, by the file of its pixels.

    Not used are older versions of these images, images that will be decoded again, and copies of
    images in another shard. Other images of the same folder keep their rows.
    """
    now = versions_of(images)
    anew = set(now[wanted].tolist())
    current, known = set(now.tolist()) - anew, set(now["who"].tolist())
    rows = rows_of(shards)
    return {
        shard.path: [
            row
            for row, version in enumerate(shard.versions.tolist())
            if rows[version] == (number, row) and (version in current or version[0] not in known)
        ]
        for number, shard in enumerate(shards)
    }


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """A context that holds the folder's lock, which is released even if the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("a")
    except OSError as error:
        other = "or choose another folder (--cache-dir), or use --decode exact"
        raise not_written(folder, error, other) from error
    with file:
        if not lock(file, folder):
            logger.warning("another run makes the cache %s; waiting for it", folder)
            lock(file, folder, wait=True)
        yield


# --- decoding -------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """A shard to build: from images to decode, and rows of older shards."""

    folder: Path
    size: int
    new: Sequence[int]
    kept: Sequence[tuple[Shard, int]]


def _tasks(
    folder: Path, size: int, new: Sequence[int], kept: Sequence[tuple[Shard, int]]
) -> list[_Task]:
    """The shards to build, all full but the last: first new images, then kept rows."""

    def task(start: int) -> _Task:
        first, last = (max(0, place - len(new)) for place in (start, start + SHARD))
        return _Task(folder, size, new[start : start + SHARD], kept[first:last])

    return [task(start) for start in range(0, len(new) + len(kept), SHARD)]


def bytes_of_one(images: ImageSet, size: int, sample: int = 64) -> float:
    """The mean size of an image in the cache, estimated from the proportions of a sample."""
    longer = []
    for index in np.linspace(0, len(images) - 1, min(sample, len(images))).astype(int).tolist():
        with contextlib.suppress(Exception):  # unreadable files are reported elsewhere
            need_file(images.paths[index])
            with Image.open(images.paths[index]) as image:
                longer.append(min(LONGEST, max(image.size) / min(image.size)))
    return 3 * size**2 * (float(np.mean(longer)) if longer else 4 / 3)


def _build(task: _Task, images: ImageSet) -> None:
    """Decode the images of a task and write its shard."""
    versions = versions_of(images.subset(task.new)).tolist()  # before the files are read
    pictures = [pixels_at(images, index, task.size) for index in task.new]
    versions += [tuple(shard.versions[row].tolist()) for shard, row in task.kept]
    pictures += [shard.read(row) for shard, row in task.kept]
    write_shard(task.folder, versions, pictures)


class _Builder(Dataset):
    """Builds one shard per item, and returns the number of its new images, or the error.

    It is a Dataset because a DataLoader's workers end when their parent is killed, and their own
    death is noticed.
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
    announcements.info("decoding %s once into %s: %s", counted(len(new)), folder, room)
    built = item_loader(_Builder(tasks, images), min(cores(), len(tasks)))
    with (
        Bar("cache", len(new)) as bar,
        worker_deaths_in_words("; start again, and the cache is continued"),
    ):
        for outcome in built:
            if isinstance(outcome, InputError):
                raise outcome
            bar.update(outcome)
