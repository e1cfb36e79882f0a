"""Sources of views: pictures in memory, processes that read files, threads that cut the cache.

Each source turns plans into batches of views; `source_of` chooses the one for an image set.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dataset.base import BadImageError, ImageSet
from dataset.cache import Cache, open_cache
from dataset.decoding import central_part
from dataset.files import warn_once
from dataset.pixel_store import PixelStore
from dataset.plans import BadImage, CutBatch, Plan, Plans, Substitutes, ViewRule
from dataset.reading import Reading
from dataset.samplers import IndexBatch
from dataset.transforms import cut
from dataset.workers import item_loader, worker_deaths_in_words
from utils import InputError

views_logger = logging.getLogger("dataset.views")  # a program can silence it


class _BatchReader(Dataset):
    """Reads and cuts whole batches, in the workers.

    Args:
        reader: the image set, or its cache. substitutes: for unreadable images.
    """

    def __init__(self, reader: ImageSet | Cache, rule: ViewRule, substitutes: Substitutes) -> None:
        self._reader = reader
        self._rule = rule
        self._substitutes = substitutes
        # Computing views for several images at once is faster than one by one. Photographs come in
        # small groups, because many would fill the worker's memory.
        self._at_once = 8 if isinstance(reader, ImageSet) else 128

    def __getitem__(self, plan: Plan) -> CutBatch:
        size = self._rule.size
        index, cluster, visit = plan.batch
        pixels = _shared_if_sent((len(index), size, size, 3))
        bad: list[BadImage] = []
        for start in range(0, len(index), self._at_once):
            part = slice(start, start + self._at_once)
            few = plan._replace(batch=IndexBatch(index[part], cluster, visit[part]))
            images = [self._read(int(each), plan.epoch, bad) for each in few.batch.index]
            views = self._rule(np.array([image.shape[:2] for image in images]), few)
            for position, image in enumerate(images):
                pixels[start + position] = cut(image, views, position, size)
        return CutBatch(pixels.permute(0, 3, 1, 2), plan, bad)

    def _read(self, index: int, epoch: int, bad: list[BadImage]) -> np.ndarray:
        try:
            return central_part(self._reader.read(index))
        except BadImageError as error:
            path, reason = error.path, error.reason
        for other in self._substitutes(index, epoch):
            try:
                image = central_part(self._reader.read(other))
            except BadImageError as error:
                bad.append(BadImage(other, error.path, error.reason, True))
                continue
            bad.append(BadImage(index, path, reason, True))
            return image
        bad.append(BadImage(index, path, reason, False))
        return np.zeros((self._rule.size, self._rule.size, 3), np.uint8)


def _shared_if_sent(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised uint8 tensor; in a worker, in memory shared with the main process."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class FromMemory:
    """Views of pictures in the device's memory; those of shape 0 could not be read."""

    def __init__(
        self, images: ImageSet, store: PixelStore, rule: ViewRule, substitutes: Substitutes
    ) -> None:
        self._images = images
        self._store = store
        self._rule = rule
        self._substitutes = substitutes
        self._unreadable = store.shapes[:, 0] == 0

    def __call__(self, plans: Iterable[Plan]) -> Iterator[CutBatch]:
        """The planned views, batch by batch."""
        for plan in plans:
            shown, bad = plan.batch.index, []
            if self._unreadable[shown].any():
                shown, bad = self._replace(plan)
            views = self._rule(self._store.shapes[shown], plan)
            yield CutBatch(self._store.cut(shown, views, self._rule.size), plan, bad)

    def _replace(self, plan: Plan) -> tuple[np.ndarray, list[BadImage]]:
        shown, bad = plan.batch.index.copy(), []
        for position in np.flatnonzero(self._unreadable[shown]):
            index = int(shown[position])
            others = self._substitutes(index, plan.epoch)
            readable = [other for other in others if not self._unreadable[other]]
            # Without a substitute, any picture will do, because the loader stops the run.
            shown[position] = readable[0] if readable else self._unreadable.argmin()
            reason = "it could not be decoded when the cache was made"
            bad.append(BadImage(index, self._images.paths[index], reason, bool(readable)))
        return shown, bad


class _FromWorkers:
    """Views made ahead of time by processes; with 0 `workers`, by this one when needed."""

    def __init__(self, batch_reader: _BatchReader, plans: Plans, workers: int, pin: bool) -> None:
        self._loader = item_loader(batch_reader, workers, sampler=plans, pin=pin)

    def __call__(self, plans: Iterable[Plan]) -> Iterator[CutBatch]:
        with worker_deaths_in_words():
            yield from self._loader


class _Errand(NamedTuple):
    """A batch of an evaluation, with everything that is needed to make it.

    `images` are only those of the batch.
    """

    images: ImageSet
    rule: ViewRule
    plan: Plan


class _Errands(Dataset):
    """Makes batches of any image set, in the workers."""

    def __getitem__(self, errand: _Errand) -> CutBatch:
        images, rule, plan = errand
        reader = _BatchReader(images, rule, Substitutes(images.labels, rule.seed, allowed=False))
        places = plan.batch._replace(index=np.arange(len(images)))
        made = reader[plan._replace(batch=places)]
        bad = [each._replace(index=int(plan.batch.index[each.index])) for each in made.bad]
        return CutBatch(made.pixels, plan, bad)


class _Queue:
    """The errands for the next iteration of the workers."""

    coming: Iterable[_Errand] = ()

    def __iter__(self) -> Iterator[_Errand]:
        return iter(self.coming)


class _FromStandingWorkers:
    """Views of an evaluation, made by processes that serve all evaluations of this process.

    Starting processes for each evaluation would take seconds if they cannot be forked. Each batch
    is sent with the list of its files, so they can read any image set.
    """

    def __init__(self, images: ImageSet, rule: ViewRule, workers: int, pin: bool) -> None:
        self._images = images
        self._rule = rule
        self._workers = workers
        self._pin = pin

    def __call__(self, plans: Iterable[Plan]) -> Iterator[CutBatch]:
        queue, loader = _standing(self._workers, self._pin, os.getpid())
        queue.coming = (self._errand(plan) for plan in plans)
        try:
            with worker_deaths_in_words():
                yield from loader
        except InputError:
            _standing.cache_clear()  # the next evaluation starts new workers
            raise

    def _errand(self, plan: Plan) -> _Errand:
        few = replace(self._images.subset(plan.batch.index), class_names=())
        return _Errand(few, self._rule, plan)


@lru_cache(maxsize=1)
def _standing(workers: int, pin: bool, process: int) -> tuple[_Queue, DataLoader]:
    """The queue and its workers.

    Args:
        process: the id of this process. A forked child has another id, so it starts its own.
    """
    queue = _Queue()
    return queue, item_loader(_Errands(), workers, sampler=queue, pin=pin)


class _FromThreads:
    """Views of the cache, cut ahead of time by threads of this process.

    Cutting is a few calls of C code that release the interpreter lock, so threads are as good as
    processes, without sending pixels between processes, which takes longer than cutting.
    """

    AHEAD = 2  # batches for each thread

    def __init__(self, batch_reader: _BatchReader, threads: int, pin: bool) -> None:
        self._cutter = batch_reader
        self._threads = threads
        self._pin = pin

    def __call__(self, plans: Iterable[Plan]) -> Iterator[CutBatch]:
        plans = iter(plans)
        pool = ThreadPoolExecutor(
            self._threads, "cut", initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            coming = deque(
                pool.submit(self._cut, plan)
                for plan in itertools.islice(plans, self.AHEAD * self._threads)
            )
            while coming:
                made = coming.popleft().result()
                coming.extend(pool.submit(self._cut, plan) for plan in itertools.islice(plans, 1))
                yield made
        finally:
            pool.shutdown(cancel_futures=True)

    def _cut(self, plan: Plan) -> CutBatch:
        made = self._cutter[plan]
        return made._replace(pixels=made.pixels.pin_memory()) if self._pin else made


Source = FromMemory | _FromThreads | _FromWorkers | _FromStandingWorkers


def source_of(
    images: ImageSet,
    plans: Plans,
    rule: ViewRule,
    device: torch.device,
    workers: int,
    reading: Reading,
    *,
    replace_bad: bool,
) -> Source:
    """The source of views for an image set.

    Args:
        replace_bad: whether an unreadable image is replaced by another of its class.

    Raises:
        InputError: the data do not fit the GPU, or there is none; the cache cannot be written.
    """
    on_gpu, cached = reading.data_device == "cuda", reading.decode == "cache"
    if on_gpu and device.type != "cuda":
        raise InputError("--data-device cuda needs a GPU, and the run has none; use cpu")
    substitutes = Substitutes(images.labels, rule.seed, replace_bad)
    if images.pixels is not None:
        place = torch.device("cpu") if reading.data_device == "cpu" else device
        return FromMemory(images, PixelStore.of_stack(images.pixels, place), rule, substitutes)
    if on_gpu and not cached:
        raise InputError("--data-device cuda keeps the cache on the GPU; add --decode cache")
    reader: ImageSet | Cache = images
    if cached:
        reader = cache = open_cache(images, reading.cache_size, reading.cache_dir)
        _say_what_differs(reading.cache_size, rule)
        if on_gpu:
            return FromMemory(images, cache.on_device(device), rule, substitutes)
    batch_reader, pin = _BatchReader(reader, rule, substitutes), device.type == "cuda"
    if cached and workers:
        return _FromThreads(batch_reader, workers, pin)
    if workers and not replace_bad:
        return _FromStandingWorkers(images, rule, workers, pin)
    return _FromWorkers(batch_reader, plans, workers, pin)


def _say_what_differs(cache_size: int, rule: ViewRule) -> None:
    """Log once per process how views of the cache differ from views of the files."""
    if rule.crop is not None and not (rule.crop.resize and rule.resize == cache_size):
        warn_once(
            "training crops come from the cache's images, whose short side is "
            f"{cache_size} pixels, not from the files",
            views_logger,
        )
    if rule.crop is None and rule.resize != cache_size:
        warn_once(
            f"evaluation takes images with a short side of {rule.resize} pixels and the cache has "
            f"{cache_size}: they are resized twice; --cache-size {rule.resize} gives the same as "
            "--decode exact",
            views_logger,
        )
