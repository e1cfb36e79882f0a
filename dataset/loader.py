"""Image sets → normalised batches on the device.

What is planned (plans.py) is cut out of the images by a source (sources.py), and changed and
normalised here, on the device. Wherever views come from, a random draw depends on (seed, epoch,
image, visit) alone: see transforms.py.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from dataset.augment import AUGMENTATIONS, Change, Shrunk
from dataset.base import ImageSet, InputSpec
from dataset.files import warn_once
from dataset.inventory import admitted_bad_images
from dataset.plans import BadImage, CutBatch, Plans, ViewRule
from dataset.readable import in_words, too_many
from dataset.reading import FROM_FILES, Reading
from dataset.samplers import BatchSampler, SequentialSampler
from dataset.sources import Source, source_of
from dataset.transforms import CHANGE_STREAM, RandomCrop, to_network, uniforms
from dataset.waiting import waiting_on
from devices import with_host_copy
from utils import InputError, nearest_names

logger = logging.getLogger("dataset")

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


class Look(NamedTuple):
    """What is seen of an image.

    Attributes:
        rule: which part of it. change: what is done to that on the device; None is nothing.
        spec: in what form the backbone wants it.
    """

    rule: ViewRule
    change: Change | None
    spec: InputSpec


class Tolerance(NamedTuple):
    """How many images may be unreadable, and what becomes of them.

    Attributes:
        share: of all images that may be unreadable, see `admitted_bad_images`.
        leave_out: whether an image that no other one replaces is left out, instead of ending the
            iteration. Its row in the batch means nothing then.
    """

    share: float = 0.0
    leave_out: bool = False


class Loader:
    """Batches of one epoch after another.

    Args:
        images: the set. plans: what is drawn, shared with a source that reads ahead.
        source: plans → views by the rule of `look`. device: where the batches go.

    Attributes:
        look: as given.
        bad_images: index → reason of every image that could not be read so far.
    """

    def __init__(
        self,
        images: ImageSet,
        plans: Plans,
        source: Source,
        look: Look,
        device: torch.device,
        tolerance: Tolerance,
    ) -> None:
        self.images = images
        self.bad_images: dict[int, str] = {}
        self._plans = plans
        self._source = source
        self.look = look
        self._device = device
        self._waiting = waiting_on(device)
        self._tolerance = tolerance
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
        """Lets workers go on with the next epoch, before epoch `until`, when they have made one.

        Otherwise they have nothing to do while the last batches of an epoch are consumed and an
        evaluation runs, and the next epoch begins by waiting for them.
        """
        self._plans.until, self._place = until, None

    def skip(self, batches: int) -> None:
        """Lets the next iteration begin after so many batches, without reading them."""
        self._skipped = batches

    def wait_seconds(self) -> float:
        """How long the running epoch's batches were waited for, so far; by the GPU if there is one.

        A GPU is waited for until it has come to the last of them.
        """
        return self._waiting.seconds()

    def __iter__(self) -> Iterator[Batch]:
        """Raises InputError when too many images cannot be read."""
        self._waiting = waiting_on(self._device)
        start, self._skipped = self._skipped, 0
        batches = self._batches(self._epoch, start)
        return self._timed(self._ahead(batches) if self._device.type == "cuda" else batches)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            self._waiting.asked()
            with _one_thread():
                batch = next(batches, None)
            self._waiting.given()
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
        rule, change, spec = self.look
        u = None
        if change is not None:
            u = uniforms(rule.seed, made.plan.epoch, index, change.draws, CHANGE_STREAM, visit)
        pixels = made.pixels.to(self._device, non_blocking=True)
        labels = with_host_copy(self.images.labels[whole], self._device)
        images = to_network(pixels, spec, change, u)
        return Batch(images, labels, torch.from_numpy(whole), cluster)

    def _take_note(self, bad: list[BadImage]) -> None:
        share, leave_out = self._tolerance
        for index, path, reason, replaced in bad:
            if not replaced and not leave_out:
                raise InputError(self._irreplaceable(path, reason))
            if index not in self.bad_images:
                self.bad_images[index] = reason
                if len(self.bad_images) <= NAMED:
                    warn_once(in_words(path, reason, replaced), logger)
                elif len(self.bad_images) == NAMED + 1:
                    warn_once("further images cannot be read; they are not named", logger)
        if len(self.bad_images) > admitted_bad_images(share, len(self.images)):
            side = "evaluation" if leave_out else "training"
            raise InputError(too_many(self.images, side, self.bad_images, share))

    def _irreplaceable(self, path: str, reason: str) -> str:
        if self._tolerance.share:
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
    reading: Reading = FROM_FILES,
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
        reading: where pixels come from.

    Raises:
        InputError: an unknown augmentation; what `source_of` raises.
    """
    if augment not in AUGMENTATIONS:
        raise InputError(
            f"--augment {augment} does not exist; {nearest_names(augment, AUGMENTATIONS)}"
        )
    crop, change = AUGMENTATIONS[augment]
    if crop is not None and crop_scale is not None:
        crop = replace(crop, scale=(crop_scale, crop.scale[1]))
    rule = _view_rule(images, crop, spec, image_size, seed)
    plans = Plans(sampler, shared=True)
    source = source_of(images, plans, rule, device, workers, reading, replace_bad=True)
    look = Look(rule, change, spec)
    return Loader(images, plans, source, look, device, Tolerance(max_bad_images))


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
    reading: Reading = FROM_FILES,
) -> Loader:
    """Every image once, in order, as evaluation sees it: short side resized, central square.

    `resize` is the short side in pixels, at least the image size; the spec's without it. Pictures
    in memory are looked at whole; `zoom` below 1 puts them on white, smaller. `batches` says which
    batches are made, where processes share them. The other arguments are those of `train_loader`.

    An image that cannot be read ends the iteration. With `max_bad_images` above 0, as many as that
    admits do not: they are named in `Loader.bad_images`, and the caller leaves their rows out.

    Raises:
        InputError: what `source_of` raises; while iterating, an image cannot be read.
    """
    rule = _view_rule(images, None, spec, image_size, seed=0)
    if resize is not None and images.pixels is None:
        rule = rule._replace(resize=resize)
    plans = Plans(SequentialSampler(len(images), batch_size, batches))
    source = source_of(images, plans, rule, device, workers, reading, replace_bad=False)
    look = Look(rule, None if zoom == 1.0 else Shrunk(zoom), spec)
    tolerance = Tolerance(max_bad_images, leave_out=max_bad_images > 0)
    return Loader(images, plans, source, look, device, tolerance)


def _view_rule(
    images: ImageSet, crop: RandomCrop | None, spec: InputSpec, image_size: int | None, seed: int
) -> ViewRule:
    size, resize = spec.size, spec.resize
    if image_size is not None and image_size != spec.size:
        size, resize = image_size, round(image_size * spec.resize / spec.size)
    return ViewRule(crop, size, 0 if images.pixels is not None else resize, seed, spec.cubic)
