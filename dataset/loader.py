"""Image sets → normalised batches on the device.

Pictures in memory are cut, changed and normalised there for a whole batch at once; files are read
and cut by worker processes, the cache on the CPU by threads; both are finished on the device. Every
way a random draw depends on (seed, epoch, image, visit) alone: see transforms.py.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import processes
from dataset.augment import AUGMENTATIONS, Change, Shrunk
from dataset.base import BadImageError, ImageSet, InputSpec
from dataset.cache import open_cache
from dataset.decoding import central_part
from dataset.files import warn_once
from dataset.inventory import admitted_bad_images
from dataset.readable import in_words, too_many
from dataset.samplers import BatchSampler, IndexBatch, SequentialSampler
from dataset.transforms import (
    CHANGE_STREAM,
    REPLACEMENT_STREAM,
    VIEW_STREAM,
    PixelStore,
    RandomCrop,
    Views,
    centre_views,
    cut,
    to_network,
    uniforms,
)
from dataset.workers import deaths_told, with_workers
from devices import with_host_copy
from utils import InputError, nearest_names

logger = logging.getLogger("dataset")
views_logger = logging.getLogger("dataset.views")  # silent where a cache was chosen, and told

# More workers than cores are the user's choice, and torch's advice names no flag of ours.
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)

DECODE = ("exact", "cache")
NAMED = 50  # images that cannot be read, and are named one by one


class Batch(NamedTuple):
    """What a training step is given.

    Attributes:
        images: (B, 3, S, S) float32 on the device, as the backbone wants them, channels last; when
            several processes train, this one's `processes.shard(B)` of them.
        labels: (B,) int64 on the device. index: (B,) int64 positions in the image set.
        cluster: the cluster all of them are from (divide and conquer), or None.
    """

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    cluster: int | None = None


# --- from a batch of indices to views -------------------------------------------------------------


class Plan(NamedTuple):
    """A batch to be made; what becomes of it is a function of this alone.

    Attributes:
        batch: what this process makes. whole: (B,) the image indices of the whole batch.
    """

    epoch: int
    batch: IndexBatch
    whole: np.ndarray


class _Plans:
    """The plans of an epoch from a batch on, and of those after it; drawn in the main process.

    With `shared` each of several processes makes its share of every batch.

    Attributes:
        epoch, start: where the next iteration begins.
        until: the epoch before which it ends; it goes beyond the one it began with if that is to
            come, and the sampler is `foreseeable`.
    """

    def __init__(self, sampler: BatchSampler, shared: bool = False) -> None:
        self.sampler = sampler
        self.shared = shared
        self.epoch = 0
        self.start = 0
        self.until = 0

    def __iter__(self) -> Iterator[Plan]:
        epoch, start, more = self.epoch, self.start, True
        while more:
            self.sampler.set_epoch(epoch)
            for batch in itertools.islice(self.sampler, start, None):
                yield Plan(epoch, self._share(batch), batch.index)
            epoch, start, more = epoch + 1, 0, self.go_on_after(epoch)

    def go_on_after(self, epoch: int) -> bool:
        """Whether the plans of the epoch after it follow at once."""
        return self.sampler.foreseeable and epoch + 1 < self.until

    def _share(self, batch: IndexBatch) -> IndexBatch:
        if not self.shared:
            return batch
        own = processes.shard(len(batch.index))
        return IndexBatch(batch.index[own], batch.cluster, batch.visit[own])


class _ViewRule(NamedTuple):
    """Which part of an image is looked at.

    Attributes:
        crop: random views, or None for the evaluation's. size: side of a view in pixels.
        resize: short side to which evaluation brings an image first; 0 for pictures in memory,
            which are looked at whole. cubic: resize like that, not bilinear.
    """

    crop: RandomCrop | None
    size: int
    resize: int
    seed: int
    cubic: bool = False

    def __call__(self, shapes: np.ndarray, plan: Plan) -> Views:
        """Views of images with these (B, 2) heights and widths."""
        if self.crop is None:
            views = centre_views(shapes, self.resize, self.size)
        else:
            index, _, visit = plan.batch
            u = uniforms(self.seed, plan.epoch, index, self.crop.draws, VIEW_STREAM, visit)
            views = self.crop.views(shapes, u, self.resize)
        return views._replace(cubic=self.cubic)


class BadImage(NamedTuple):
    """An image that could not be read, and whether another one of its class took its place."""

    index: int
    path: str
    reason: str
    replaced: bool


class _Substitutes(NamedTuple):
    """Which images may stand in for one that cannot be read; nothing may in an evaluation."""

    labels: np.ndarray
    seed: int
    allowed: bool

    def __call__(self, index: int, epoch: int) -> list[int]:
        """The other images of the class, beginning at a random one."""
        if not self.allowed:
            return []
        others = np.flatnonzero(self.labels == self.labels[index])
        others = others[others != index]
        u = uniforms(self.seed, epoch, np.array([index]), 1, REPLACEMENT_STREAM)
        return np.roll(others, -int(u[0, 0] * len(others))).tolist()


class CutBatch(NamedTuple):
    """A batch of views on its way: pixels (B, 3, S, S), RGB, 0..255."""

    pixels: torch.Tensor
    plan: Plan
    bad: list[BadImage]


class _Reader(Protocol):
    def read(self, index: int) -> np.ndarray: ...


class _BatchReader(Dataset):
    """Reads and cuts whole batches; runs in the workers.

    Args:
        reader: the image set, or its cache. substitutes: for images that cannot be read.
    """

    def __init__(self, reader: _Reader, rule: _ViewRule, substitutes: _Substitutes) -> None:
        self._reader = reader
        self._rule = rule
        self._substitutes = substitutes
        # Views are computed for several images at once, which costs less than one by one; for few
        # photographs, which otherwise would fill the worker's memory.
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
    """An uninitialised uint8 tensor; in a worker it lies where the main process can read it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _FromMemory:
    """Views of pictures in memory, cut where they lie; those of shape 0 could not be read."""

    def __init__(
        self, images: ImageSet, store: PixelStore, rule: _ViewRule, substitutes: _Substitutes
    ) -> None:
        self._images = images
        self._store = store
        self._rule = rule
        self._substitutes = substitutes
        self._unreadable = store.shapes[:, 0] == 0

    def __call__(self, plans: Iterable[Plan]) -> Iterator[CutBatch]:
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
            # Without another one any picture will do: the loader stops the run.
            shown[position] = readable[0] if readable else self._unreadable.argmin()
            reason = "it could not be decoded when the cache was made"
            bad.append(BadImage(index, self._images.paths[index], reason, bool(readable)))
        return shown, bad


class _FromWorkers:
    """Views that processes make ahead of time; with `workers` 0 this one makes them when asked."""

    def __init__(self, batch_reader: _BatchReader, plans: _Plans, workers: int, pin: bool) -> None:
        self._loader = with_workers(batch_reader, workers, sampler=plans, pin=pin)

    def __call__(self, plans: Iterable[Plan]) -> Iterator[CutBatch]:
        with deaths_told():
            yield from self._loader


class _Errand(NamedTuple):
    """A batch of an evaluation, with all that is needed to make it: `images` are those of it."""

    images: ImageSet
    rule: _ViewRule
    plan: Plan


class _Errands(Dataset):
    """Makes batches of any image set; runs in the workers."""

    def __getitem__(self, errand: _Errand) -> CutBatch:
        images, rule, plan = errand
        reader = _BatchReader(images, rule, _Substitutes(images.labels, rule.seed, allowed=False))
        places = plan.batch._replace(index=np.arange(len(images)))
        made = reader[plan._replace(batch=places)]
        bad = [each._replace(index=int(plan.batch.index[each.index])) for each in made.bad]
        return CutBatch(made.pixels, plan, bad)


class _Queue:
    """What workers are to make next."""

    coming: Iterable[_Errand] = ()

    def __iter__(self) -> Iterator[_Errand]:
        return iter(self.coming)


class _FromStandingWorkers:
    """Views of an evaluation, from processes that serve all evaluations of this process.

    Starting some for each evaluation takes seconds where they cannot be forked. They are told with
    each batch which files it is made of, so that any image set can be read by them.
    """

    def __init__(self, images: ImageSet, rule: _ViewRule, workers: int, pin: bool) -> None:
        self._images = images
        self._rule = rule
        self._workers = workers
        self._pin = pin

    def __call__(self, plans: Iterable[Plan]) -> Iterator[CutBatch]:
        queue, loader = _standing(self._workers, self._pin, os.getpid())
        queue.coming = (self._errand(plan) for plan in plans)
        try:
            with deaths_told():
                yield from loader
        except InputError:
            _standing.cache_clear()  # the next evaluation starts others
            raise

    def _errand(self, plan: Plan) -> _Errand:
        few = replace(self._images.subset(plan.batch.index), class_names=())
        return _Errand(few, self._rule, plan)


@lru_cache(maxsize=1)
def _standing(workers: int, pin: bool, process: int) -> tuple[_Queue, DataLoader]:
    """The queue and its workers; those of the process that this one was forked from are not its."""
    queue = _Queue()
    return queue, with_workers(_Errands(), workers, sampler=queue, pin=pin)


class _FromThreads:
    """Views that threads of this process cut ahead of time.

    For the cache: cutting is a few calls of C code that let other threads run, so that threads do
    what processes do, without sending pixels from one to another, which costs more than cutting.
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


_Source = _FromMemory | _FromThreads | _FromWorkers | _FromStandingWorkers

# --- the loader -----------------------------------------------------------------------------------


class Loader:
    """Batches of one epoch after another.

    Args:
        images: the set. plans: what is drawn, shared with a source that reads ahead.
        source: plans → views. rule, change: which views, and what is done to them on the device.
        spec: what the backbone wants. device: where the batches go.
        max_bad_images: how many images may be unreadable, see `admitted_bad_images`.
        leave_out: unreadable images that no other replaces do not stop it, up to that share; what
            stands in their places in the batches means nothing.

    Attributes:
        wait_seconds: how long the consumer of the running epoch has waited for batches.
        bad_images: index → reason of every image that could not be read so far.
    """

    def __init__(
        self,
        images: ImageSet,
        plans: _Plans,
        source: _Source,
        rule: _ViewRule,
        change: Change | None,
        spec: InputSpec,
        device: torch.device,
        max_bad_images: float = 0.0,
        leave_out: bool = False,
    ) -> None:
        self.images = images
        self.wait_seconds = 0.0
        self.bad_images: dict[int, str] = {}
        self._plans = plans
        self._source = source
        self._rule = rule
        self._change = change
        self._spec = spec
        self._device = device
        self._max_bad_images = max_bad_images
        self._leave_out = leave_out
        self._epoch = self._skipped = 0
        self._views: Iterator[CutBatch] = iter(())
        self._place: tuple[BatchSampler, int, int] | None = None  # of the next of them

    def __len__(self) -> int:
        return len(self._plans.sampler)

    def set_sampler(self, sampler: BatchSampler) -> None:
        """Batches come from another sampler from the next iteration on."""
        self._plans.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration runs through, from its beginning."""
        self._epoch, self._skipped = epoch, 0

    def read_ahead(self, until: int) -> None:
        """Lets workers go on with the epochs that follow, before `until`, when one is made.

        Without it they have nothing to do while the last batches of an epoch are consumed and an
        evaluation runs, and the next epoch begins by waiting for them.
        """
        self._plans.until, self._place = until, None

    def skip(self, batches: int) -> None:
        """Lets the next iteration begin after so many batches, without reading them."""
        self._skipped = batches

    def __iter__(self) -> Iterator[Batch]:
        """Raises InputError when too many images cannot be read."""
        self.wait_seconds = 0.0
        start, self._skipped = self._skipped, 0
        batches = self._batches(self._epoch, start)
        return self._timed(self._ahead(batches) if self._device.type == "cuda" else batches)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            with _one_thread():
                batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from `start` on; the views of the next are made meanwhile."""
        sampler, goes_on = self._plans.sampler, self._plans.go_on_after(epoch)
        if self._place != (sampler, epoch, start):
            self._plans.epoch, self._plans.start = epoch, start
            self._views = self._source(self._plans)
        for number in itertools.count(start + 1):
            self._place = None  # where this fails, nothing comes after it
            made = next(self._views, None)
            if made is None:
                return
            self._take_note(made.bad)
            ends = goes_on and number == len(sampler)
            self._place = (sampler, epoch + 1, 0) if ends else (sampler, epoch, number)
            yield self._finish(made)
            if ends:
                return

    def _ahead(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """Batches on the GPU, one ahead, made on a stream of their own while the network runs."""
        stream = _beside_the_network(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        ready: tuple[Batch, torch.cuda.Event] | None = None
        while True:
            with torch.cuda.stream(stream):
                batch = next(source, None)
                event = stream.record_event()
            if ready is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(ready[1])
                for tensor in ready[0][:2]:
                    # Without this its memory could be given to the next batch too early.
                    tensor.record_stream(current)
                yield ready[0]
            if batch is None:
                return
            ready = batch, event

    def _finish(self, made: CutBatch) -> Batch:
        """Views → the batch, on the device, in float32."""
        (index, cluster, visit), whole = made.plan.batch, made.plan.whole
        u = None
        if self._change is not None:
            draws = self._change.draws
            u = uniforms(self._rule.seed, made.plan.epoch, index, draws, CHANGE_STREAM, visit)
        pixels = made.pixels.to(self._device, non_blocking=True)
        labels = with_host_copy(self.images.labels[whole], self._device)
        images = to_network(pixels, self._spec, self._change, u)
        return Batch(images, labels, torch.from_numpy(whole), cluster)

    def _take_note(self, bad: list[BadImage]) -> None:
        for index, path, reason, replaced in bad:
            if not replaced and not self._leave_out:
                raise InputError(self._irreplaceable(path, reason))
            if index not in self.bad_images:
                self.bad_images[index] = reason
                if len(self.bad_images) <= NAMED:
                    warn_once(in_words(path, reason, replaced), logger)
                elif len(self.bad_images) == NAMED + 1:
                    warn_once("further images cannot be read; they are not named", logger)
        if len(self.bad_images) > admitted_bad_images(self._max_bad_images, len(self.images)):
            side = "evaluation" if self._leave_out else "training"
            raise InputError(too_many(self.images, side, self.bad_images, self._max_bad_images))

    def _irreplaceable(self, path: str, reason: str) -> str:
        if self._max_bad_images:
            why = "and no other image of its class can take its place"
        else:
            why = "and an evaluation leaves no image out"
        return (
            f"{path} cannot be read ({reason}) {why}; repair or remove it "
            f"(`{self.images.check_command} --json` names all of them)"
        )


@lru_cache
def _beside_the_network(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches are made, one for all epochs and evaluations.

    torch keeps memory for the stream that it was taken on: with a new one for each epoch, what the
    epochs before had given back would lie there unused, until the GPU is full.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch's CPU arithmetic in this thread.

    Batches are small pieces of work: with several threads, each waits for the others to be given a
    core, spinning, while the workers want all cores. That costs more than it could gain.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_loader(
    images: ImageSet,
    sampler: BatchSampler,
    *,
    augment: str,
    spec: InputSpec,
    device: torch.device,
    workers: int,
    seed: int,
    image_size: int | None = None,
    crop_scale: float | None = None,
    max_bad_images: float = 0.01,
    **reading: Any,
) -> Loader:
    """Augmented batches in the sampler's order; of several processes each makes its share.

    Args:
        augment: a name of `AUGMENTATIONS`. spec: what the backbone wants.
        workers: processes that read files, or threads that cut the cache's pixels; pictures in
            memory need none.
        image_size: side of the network's input in pixels; the spec's without it.
        crop_scale: the smallest share of a picture's area that a random crop has; the
            augmentation's own without it.
        max_bad_images: the share of images that may be unreadable; each is replaced by others of
            its class and named in a warning.
        reading: where pixels come from, see `_source`.

    Raises:
        InputError: an unknown augmentation; what `_source` raises.
    """
    if augment not in AUGMENTATIONS:
        raise InputError(
            f"--augment {augment} does not exist; {nearest_names(augment, AUGMENTATIONS)}"
        )
    crop, change = AUGMENTATIONS[augment]
    if crop is not None and crop_scale is not None:
        crop = replace(crop, scale=(crop_scale, crop.scale[1]))
    rule = _view_rule(images, crop, spec, image_size, seed)
    plans = _Plans(sampler, shared=True)
    source = _source(images, plans, rule, device, workers, replace_bad=True, **reading)
    return Loader(images, plans, source, rule, change, spec, device, max_bad_images)


def eval_loader(
    images: ImageSet,
    *,
    spec: InputSpec,
    batch_size: int,
    device: torch.device,
    workers: int,
    image_size: int | None = None,
    zoom: float = 1.0,
    resize: int | None = None,
    batches: slice = slice(None),
    max_bad_images: float = 0.0,
    **reading: Any,
) -> Loader:
    """Every image once, in order, as evaluation sees it: short side resized, central square.

    `resize` is the short side in pixels, at least the image size; the spec's without it. Pictures
    in memory are looked at whole; `zoom` below 1 puts them on white, smaller. `batches` says which
    batches are made, where processes share them. The other arguments are those of `train_loader`.

    An image that cannot be read ends the iteration. With `max_bad_images` above 0, as many as that
    admits do not: they are named in `Loader.bad_images`, and the caller leaves their rows out.

    Raises:
        InputError: what `_source` raises; while iterating, an image cannot be read.
    """
    rule = _view_rule(images, None, spec, image_size, seed=0)
    if resize is not None and images.pixels is None:
        rule = rule._replace(resize=resize)
    plans = _Plans(SequentialSampler(len(images), batch_size, batches))
    source = _source(images, plans, rule, device, workers, replace_bad=False, **reading)
    shrunk = None if zoom == 1.0 else Shrunk(zoom)
    leave_out = max_bad_images > 0
    return Loader(
        images, plans, source, rule, shrunk, spec, device, max_bad_images, leave_out=leave_out
    )


def _view_rule(
    images: ImageSet, crop: RandomCrop | None, spec: InputSpec, image_size: int | None, seed: int
) -> _ViewRule:
    size, resize = spec.size, spec.resize
    if image_size is not None and image_size != spec.size:
        size, resize = image_size, round(image_size * spec.resize / spec.size)
    return _ViewRule(crop, size, 0 if images.pixels is not None else resize, seed, spec.cubic)


def _source(
    images: ImageSet,
    plans: _Plans,
    rule: _ViewRule,
    device: torch.device,
    workers: int,
    *,
    replace_bad: bool,
    decode: str = "exact",
    data_device: str | None = None,
    cache_dir: str | Path | None = None,
    cache_size: int = 256,
) -> _Source:
    """Where views come from.

    Args:
        replace_bad: an image that cannot be read is replaced by another of its class.
        decode: "exact" decodes a file each time it is needed; "cache" keeps the pixels of all files
            on disk, their short side brought to `cache_size` (see cache.py).
        data_device: "cuda" keeps the cache's pixels in the GPU's memory. Pictures that are in
            memory anyway go to the device unless this says "cpu".

    Raises:
        InputError: an unknown word; the data do not fit the GPU; the cache cannot be written.
    """
    if decode not in DECODE:
        raise InputError(f"--decode {decode} does not exist; {nearest_names(decode, DECODE)}")
    if data_device not in (None, "cpu", "cuda"):
        raise InputError(f"--data-device {data_device} does not exist; choose cpu or cuda")
    if data_device == "cuda" and device.type != "cuda":
        raise InputError("--data-device cuda needs a GPU, and the run has none; use cpu")
    substitutes = _Substitutes(images.labels, rule.seed, replace_bad)
    if images.pixels is not None:
        place = torch.device("cpu") if data_device == "cpu" else device
        return _FromMemory(images, PixelStore.of_stack(images.pixels, place), rule, substitutes)
    if decode == "exact" and data_device == "cuda":
        raise InputError("--data-device cuda keeps the cache on the GPU; add --decode cache")
    reader: _Reader = images
    if decode == "cache":
        reader = cache = open_cache(images, cache_size, cache_dir)
        _say_what_differs(cache_size, rule)
        if data_device == "cuda":
            return _FromMemory(images, cache.on_device(device), rule, substitutes)
    batch_reader, pin = _BatchReader(reader, rule, substitutes), device.type == "cuda"
    if decode == "cache" and workers:
        return _FromThreads(batch_reader, workers, pin)
    if workers and not replace_bad:
        return _FromStandingWorkers(images, rule, workers, pin)
    return _FromWorkers(batch_reader, plans, workers, pin)


def _say_what_differs(cache_size: int, rule: _ViewRule) -> None:
    """Logs how views of the cache differ from views of the files, once for a process."""
    if rule.crop is not None and not (rule.crop.resize and rule.resize == cache_size):
        warn_once(
            "training crops come from the cache's images, whose short side is "
            f"{cache_size} pixels, not from the files",
            views_logger,
        )
    if rule.crop is None and rule.resize != cache_size:
        warn_once(
            f"evaluation wants images with a short side of {rule.resize} pixels and the cache has "
            f"{cache_size}: they are resized twice; --cache-size {rule.resize} gives what --decode "
            "exact gives",
            views_logger,
        )
