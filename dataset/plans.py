"""Plans of batches: the images, the part of each, and substitutes for unreadable ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

import processes
from dataset.samplers import BatchSampler, IndexBatch
from dataset.transforms import (
    REPLACEMENT_STREAM,
    VIEW_STREAM,
    RandomCrop,
    Views,
    centre_views,
    uniforms,
)


class Plan(NamedTuple):
    """A planned batch, on which its pixels depend and on nothing else.

    Attributes:
        epoch: its epoch.
        batch: this process's share of it.
        whole: (B,) int64 image indices of the whole batch.
    """

    epoch: int
    batch: IndexBatch
    whole: np.ndarray


class Plans:
    """Yields the plans of an epoch from some batch on, and of later epochs; in the main process.

    With `shared`, each of several processes makes its share of every batch.

    Attributes:
        epoch, start: the epoch and the batch with which the next iteration begins.
        until: the epoch before which it ends at the latest. It continues with the next epoch only
            if the sampler is `foreseeable`.
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
        """Whether the plans of the next epoch follow without a new iteration."""
        return self.sampler.foreseeable and epoch + 1 < self.until

    def _share(self, batch: IndexBatch) -> IndexBatch:
        if not self.shared:
            return batch
        own = processes.shard(len(batch.index))
        return IndexBatch(batch.index[own], batch.cluster, batch.visit[own])


class ViewRule(NamedTuple):
    """Decides which part of an image is cut out.

    Attributes:
        crop: random views, or None for those of evaluation. size: side of a view in pixels.
        resize: the short side of resized images in evaluation; 0 for pictures in memory, which are
            not cropped. cubic: whether resizing is cubic instead of bilinear.
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
    """An image that could not be read, and whether another one of its class replaced it."""

    index: int
    path: str
    reason: str
    replaced: bool


class Substitutes(NamedTuple):
    """Finds images that may replace an unreadable one; in an evaluation there are none.

    Attributes:
        labels: (N,) int64 of the image set. seed: the seed for drawing among them.
        allowed: False in an evaluation.
    """

    labels: np.ndarray
    seed: int
    allowed: bool

    def __call__(self, index: int, epoch: int) -> list[int]:
        """The other images of the class, in the order of attempts, starting at a random one."""
        if not self.allowed:
            return []
        others = np.flatnonzero(self.labels == self.labels[index])
        others = others[others != index]
        u = uniforms(self.seed, epoch, np.array([index]), 1, REPLACEMENT_STREAM)
        return np.roll(others, -int(u[0, 0] * len(others))).tolist()


class CutBatch(NamedTuple):
    """A batch of views from a source: pixels (B, 3, S, S), RGB, 0..255."""

    pixels: torch.Tensor
    plan: Plan
    bad: list[BadImage]
