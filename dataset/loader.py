"""Image sets → normalised batches on the device.

Views are planned (plans.py), cut out of the images by a source (sources.py), and then changed and
normalised here, on the device. With any source, random draws depend only on (seed, epoch, image,
visit): see transforms.py.
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

NAMED = 50  # unreadable images that are named one by one


class Batch(NamedTuple):
    """The batch of a training step.

    Attributes:
        images: (B, 3, S, S) float32 on the device, normalised for the backbone, channels last; if
            several processes train, this one's `processes.shard(B)` of them.
        labels: (B,) int64 on the device. index: (B,) int64 positions in the image set.
        cluster: the cluster of all of them (divide and conquer), or None.
    """

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    cluster: int | None = None


class Look(NamedTuple):
    """How an image becomes an input of the network.

    Attributes:
        rule: which part of it is cut out. change: the change of that part on the device, or None.
        spec: the input that the backbone expects.
    """

    rule: ViewRule
    change: Change | None
    spec: InputSpec


class Tolerance(NamedTuple):
    """How many images may be unreadable, and what happens to them.

    Attributes:
        share: the share of images that may be unreadable, see `admitted_bad_images`.
        leave_out: whether an image that is not replaced by another is left out, instead of ending
            the iteration. Its row in the batch is then meaningless.
    """

    share: float = 0.0
    leave_out: bool = False


class Loader:
    """Batches of one epoch after another.

    Args:
        images: the image set. plans: the planned batches, shared with a source that reads ahead.
        source: plans → views by the rule of `look`. device: the device of the batches.

    Attributes:
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
        # The sampler, epoch and number of the batch that `_views` gives next.
        self._place: tuple[BatchSampler, int, int] | None = None

    def __len__(self) -> int:
        return len(self._plans.sampler)

    def set_sampler(self, sampler: BatchSampler) -> None:
        """Take batches from another sampler from the next iteration on."""
        self._plans.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, which starts at its beginning."""
        self._epoch, self._skipped = epoch, 0

    def read_ahead(self, until: int) -> None:
        """Let workers continue with the next epoch, up to epoch `until`, when one is made.

        Otherwise they would be idle while the last batches of an epoch are consumed and evaluation
        runs, and the next epoch would begin by waiting for them.
        """
        self._plans.until, self._place = until, None

    def skip(self, batches: int) -> None:
        """Let the next iteration begin after so many batches, without reading these."""
        self._skipped = batches

    def wait_seconds(self) -> float:
        """How long the current epoch has waited for batches so far; on a GPU, how long the GPU has.

        On a GPU, this waits until it has reached the last batch.
        """
        return self._waiting.seconds()

    def __iter__(self) -> Iterator[Batch]:
        """Raises InputError if too many images cannot be read."""
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
        """The batches of an epoch from `start` on; workers make further views meanwhile."""
        sampler, goes_on = self._plans.sampler, self._plans.go_on_after(epoch)
        if self._place != (sampler, epoch, start):
            self._plans.epoch, self._plans.start = epoch, start
            self._views = self._source(self._plans)
        for number in itertools.count(start + 1):
            self._place = None  # if the source fails here, it cannot be continued
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
        """Batches on the GPU, made one ahead on a separate stream while the network runs."""
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
                    # Otherwise its memory could be reused for the next batch too early.
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
    """The stream on which batches are made, the same one for all epochs and evaluations.

    torch reuses freed memory only on the stream that it was allocated on. With a new stream for
    each epoch, the freed memory of earlier epochs would stay unused until the GPU is full.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A context in which torch computes in this thread only.

    A batch is little work, and the workers use all cores: several threads would mostly spin,
    waiting for each other to get a core.
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
    """Augmented batches in the sampler's order; if several processes train, each makes its share.

    Args:
        augment: a name of `AUGMENTATIONS`. spec: the input that the backbone expects.
        workers: the number of processes that read files, or of threads that cut views out of the
            cache; pictures in memory need none.
        image_size: side of the network's input in pixels; None is that of the spec.
        crop_scale: the smallest share of a picture's area in a random crop; None is that of the
            augmentation.
        max_bad_images: the share of images that may be unreadable; they are replaced by others of
            their classes and named in a warning.
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

    `resize` is the short side in pixels, at least the image size; None is that of the spec.
    Pictures in memory are not cropped; `zoom` below 1 makes them smaller, on white. `batches`
    selects the batches to make, if processes share them. The other arguments are those of
    `train_loader`.

    An unreadable image ends the iteration, unless `max_bad_images` allows it: then it is named in
    `Loader.bad_images`, and the caller leaves its row out.

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
