"""Image sets → normalised batches on the device.

Pictures that live in memory are gathered, redrawn and normalised for a whole batch at once; files
are decoded and cut by worker processes, travel as uint8, and are finished on the device. Either way
a random draw depends on (seed, epoch, image, visit) alone: see transforms.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.base import ImageSet
from dataset.samplers import BatchSampler, IndexBatch, SequentialSampler
from dataset.transforms import (
    AUGMENTATIONS,
    VIEW_STREAM,
    WARP_STREAM,
    Augmentation,
    Views,
    centre_views,
    cut,
    normalised,
    resize,
    uniforms,
)

if TYPE_CHECKING:
    from net import InputSpec


class Batch(NamedTuple):
    """What a training step is given.

    Attributes:
        images: (B, 3, S, S) float32 on the device, as the backbone wants them.
        labels: (B,) int64 on the device. index: (B,) int64 positions in the image set.
        cluster: the cluster all of them are from (divide and conquer), or None.
    """

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    cluster: int | None = None


class Plan(NamedTuple):
    """What a worker needs to make the views of one batch; a pure function of it."""

    batch: IndexBatch
    seed: int
    epoch: int


class ViewMaker:
    """Cuts the uint8 views of a batch out of its images: (B, S, S, 3).

    Args:
        images: the set. augmentation: None cuts the evaluation's central square.
        size, resize: side of the view, and short side the image is brought to before, in pixels.
    """

    def __init__(
        self, images: ImageSet, augmentation: Augmentation | None, size: int, resize: int
    ) -> None:
        self.images = images
        self.augmentation = augmentation
        self.size = size
        self.resize = resize

    def __call__(self, plan: Plan) -> torch.Tensor:
        """The views of a planned batch."""
        if self.images.pixels is not None:
            return self._from_memory(plan)
        pixels = [self.images.read(int(image)) for image in plan.batch.index]
        shapes = np.array([image.shape[:2] for image in pixels])
        views = self._views(shapes, plan)
        return torch.stack([cut(image, views, i, self.size) for i, image in enumerate(pixels)])

    def _from_memory(self, plan: Plan) -> torch.Tensor:
        stack = torch.from_numpy(self.images.pixels[plan.batch.index])
        if self.augmentation and self.augmentation.crop:
            shapes = np.tile(stack.shape[1:3], (len(stack), 1))
            views = self._views(shapes, plan)
            return torch.stack([cut(im.numpy(), views, i, self.size) for i, im in enumerate(stack)])
        if stack.shape[1:3] == (self.size, self.size):
            return stack
        return resize(stack.permute(0, 3, 1, 2), (self.size, self.size)).permute(0, 2, 3, 1)

    def _views(self, shapes: np.ndarray, plan: Plan) -> Views:
        crop = self.augmentation.crop if self.augmentation else None
        if crop is None:
            return centre_views(shapes, self.resize, self.size)
        index, _, visit = plan.batch
        u = uniforms(plan.seed, plan.epoch, index, crop.draws, VIEW_STREAM, visit)
        return crop.views(shapes, u, self.resize)


class _PlannedViews(Dataset):
    """A torch Dataset whose items are whole batches: the key is the plan of one."""

    def __init__(self, make: ViewMaker) -> None:
        self.make = make

    def __getitem__(self, plan: Plan) -> tuple[torch.Tensor, Plan]:
        return self.make(plan), plan


class Loader:
    """Batches of one epoch after another.

    Args:
        sampler: which images make a batch. make: cuts their views.
        spec: what the backbone wants. device: where the batches go.
        workers: processes that decode files; pictures in memory need none.
        seed: of the augmentation.

    Attributes:
        wait_seconds: how long the consumer of the running epoch has waited for batches.
    """

    def __init__(
        self,
        sampler: BatchSampler,
        make: ViewMaker,
        spec: InputSpec,
        device: torch.device,
        workers: int,
        seed: int = 0,
    ) -> None:
        self._sampler = sampler
        self._seed = seed
        self._make = make
        self._spec = spec
        self._device = device
        self._workers = 0 if make.images.pixels is not None else workers
        self._epoch = 0
        self._start = 0
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self._sampler)

    def set_sampler(self, sampler: BatchSampler) -> None:
        """Batches come from another sampler from the next iteration on."""
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration runs through, from its beginning."""
        self._epoch, self._start = epoch, 0

    def skip(self, batches: int) -> None:
        """Lets the next iteration begin after so many batches, without reading them."""
        self._start = batches

    def __iter__(self) -> Iterator[Batch]:
        self.wait_seconds = 0.0
        source = iter(self._views())
        while True:
            start = time.perf_counter()
            views, plan = next(source, (None, None))
            batch = None if plan is None else self._finish(views, plan)
            self.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _views(self) -> Iterator[tuple[torch.Tensor, Plan]]:
        self._sampler.set_epoch(self._epoch)
        batches = itertools.islice(self._sampler, self._start, None)
        plans = (Plan(batch, self._seed, self._epoch) for batch in batches)
        if not self._workers:
            return ((self._make(plan), plan) for plan in plans)
        return iter(
            DataLoader(
                _PlannedViews(self._make),
                batch_size=None,
                sampler=plans,
                num_workers=self._workers,
                pin_memory=self._device.type == "cuda",
                prefetch_factor=4,
            )
        )

    def _finish(self, views: torch.Tensor, plan: Plan) -> Batch:
        """uint8 views (B, S, S, 3) → the batch, on the device, in float32."""
        index, cluster, visit = plan.batch
        images = views.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        augmentation = self._make.augmentation
        if augmentation and augmentation.redraw:
            draws = augmentation.redraw.draws
            u = uniforms(plan.seed, plan.epoch, index, draws, WARP_STREAM, visit)
            images = augmentation.redraw(images.contiguous(), u)
        labels = torch.from_numpy(self._make.images.labels[index])
        return Batch(
            normalised(images, self._spec),
            labels.to(self._device, non_blocking=True),
            torch.from_numpy(np.ascontiguousarray(index)),
            cluster,
        )


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
) -> Loader:
    """Augmented batches in the sampler's order; `augment` is a name of `AUGMENTATIONS`."""
    make = ViewMaker(images, AUGMENTATIONS[augment], *_sizes(spec, image_size))
    return Loader(sampler, make, spec, device, workers, seed)


def eval_loader(
    images: ImageSet,
    *,
    spec: InputSpec,
    batch_size: int,
    device: torch.device,
    workers: int,
    image_size: int | None = None,
) -> Loader:
    """Every image once, in order, as evaluation sees it: short side resized, central square."""
    sampler = SequentialSampler(len(images), batch_size)
    make = ViewMaker(images, None, *_sizes(spec, image_size))
    return Loader(sampler, make, spec, device, workers)


def _sizes(spec: InputSpec, image_size: int | None) -> tuple[int, int]:
    """Side of the square the network sees, and the short side it is cut from (224 of 256)."""
    if image_size is None or image_size == spec.size:
        return spec.size, spec.resize
    return image_size, round(image_size * spec.resize / spec.size)
