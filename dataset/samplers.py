"""Samplers: they choose the images of every batch.

A sampler depends only on (seed, epoch), knows its exact length, and can start at any epoch. It runs
in the main process, so the number of workers does not matter. The sampler of divide and conquer is
in cluster_sampler.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import numpy as np

from utils import InputError


class IndexBatch(NamedTuple):
    """The images of a batch.

    Attributes:
        index: (B,) int64 image indices. cluster: the cluster of all of them, or None.
        visit: (B,) int64, how often each image was drawn before in this epoch.
    """

    index: np.ndarray
    cluster: int | None
    visit: np.ndarray


class BatchSampler(ABC):
    """Draws batches, epoch by epoch; an epoch is `len(self)` batches.

    Args:
        images: the number of images. seed: the batches depend on it and the epoch, on nothing else.

    Attributes:
        foreseeable: whether an epoch does not depend on training, so that its images can be read
            during the epoch before it.
    """

    foreseeable: ClassVar[bool] = False

    def __init__(self, images: int, batch_size: int, seed: int = 0) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int:
        """The number of batches per epoch."""

    @abstractmethod
    def draw(self, epoch: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """The batches of an epoch as (image indices, cluster)."""

    def generator(self, epoch: int) -> np.random.Generator:
        """The random generator of an epoch."""
        return np.random.default_rng([self.seed % 2**63, epoch])

    def __iter__(self) -> Iterator[IndexBatch]:
        drawn = np.zeros(self.images, np.int64)
        for index, cluster in self.draw(self.epoch):
            yield IndexBatch(index, cluster, _count_visits(index, drawn))


def _count_visits(index: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """How often each image of the batch was drawn before; updates `drawn` (N,)."""
    order = np.argsort(index, kind="stable")
    ranked = index[order]
    new = np.r_[True, ranked[1:] != ranked[:-1]]
    first = np.maximum.accumulate(np.where(new, np.arange(len(ranked)), 0))
    visit = np.empty(len(index), np.int64)
    visit[order] = drawn[ranked] + np.arange(len(ranked)) - first
    np.add.at(drawn, index, 1)
    return visit


class SequentialSampler(BatchSampler):
    """All images in order, for evaluation; the last batch may be smaller.

    `batches` selects some of them, if several processes share the work.
    """

    def __init__(self, images: int, batch_size: int, batches: slice = slice(None)) -> None:
        super().__init__(images, batch_size)
        self._starts = range(0, images, batch_size)[batches]

    def __len__(self) -> int:
        return len(self._starts)

    def draw(self, epoch: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """See `BatchSampler.draw`."""
        for start in self._starts:
            yield np.arange(start, min(start + self.batch_size, self.images)), None


class ShuffledSampler(BatchSampler):
    """A new permutation each epoch; the remainder that does not fill a batch is left out.

    Raises:
        InputError: a batch is larger than the data.
    """

    foreseeable = True

    def __init__(self, images: int, batch_size: int, seed: int = 0) -> None:
        super().__init__(images, batch_size, seed)
        if not 1 <= batch_size <= images:
            raise InputError(
                f"a batch of {batch_size} images cannot be drawn from {images}; choose a "
                f"--batch-size from 1 to {images}"
            )

    def __len__(self) -> int:
        return self.images // self.batch_size

    def draw(self, epoch: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """See `BatchSampler.draw`."""
        order = self.generator(epoch).permutation(self.images)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size], None


class ImagesByClass:
    """The images of each class among `members`, drawn from at random.

    Attributes:
        members: (n,) image indices, grouped by class. starts: (C + 1,) where each class begins.
    """

    def __init__(self, labels: np.ndarray, members: np.ndarray | None = None) -> None:
        members = np.arange(len(labels)) if members is None else members
        order = np.argsort(labels[members], kind="stable")
        self.members = members[order]
        present = labels[self.members]
        new = np.flatnonzero(np.r_[True, present[1:] != present[:-1]])
        self.starts = np.r_[new, len(present)]
        self.sizes = np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.sizes)

    def of(self, c: int) -> np.ndarray:
        """Image indices of class number `c` among those present."""
        return self.members[self.starts[c] : self.starts[c + 1]]

    def random(
        self, rng: np.random.Generator, c: int, count: int, repeat: bool = False
    ) -> np.ndarray:
        """`count` images of class `c`: different ones, unless `repeat`, or the class has fewer."""
        return rng.choice(self.of(c), count, replace=repeat or self.sizes[c] < count)


class BalancedSampler(BatchSampler):
    """batch/instances classes with `instances` images each, class by class; `--IPC`, and SEC.

    Classes are not repeated in a batch. Images are repeated only in classes with fewer than
    `instances`; with `repeat`, they are drawn with replacement, as in the sampler released with
    Proxy-Anchor. An epoch is as long as with shuffled batches.

    Raises:
        InputError: the batch is not a multiple of `instances`, or there are too few classes.
    """

    foreseeable = True

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        instances: int,
        seed: int = 0,
        *,
        repeat: bool = False,
    ) -> None:
        super().__init__(len(labels), batch_size, seed)
        self.instances = instances
        self.repeat = repeat
        self._classes = ImagesByClass(np.asarray(labels))
        self._groups = classes_in(batch_size, instances)
        if self._groups > len(self._classes):
            raise InputError(
                f"a batch of {batch_size} images with {instances} per class takes {self._groups} "
                f"classes, and the data have {len(self._classes)}; choose a smaller --batch-size "
                "or more images per class"
            )

    def __len__(self) -> int:
        return max(1, self.images // self.batch_size)

    def draw(self, epoch: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """See `BatchSampler.draw`."""
        rng = self.generator(epoch)
        for _ in range(len(self)):
            chosen = rng.choice(len(self._classes), self._groups, replace=False)
            parts = [self._classes.random(rng, c, self.instances, self.repeat) for c in chosen]
            yield np.concatenate(parts), None


def classes_in(batch_size: int, instances: int) -> int:
    """The number of classes in a batch with `instances` images of each.

    Raises:
        InputError: the batch is not a multiple of `instances`.
    """
    groups, rest = divmod(batch_size, instances)
    if rest or not groups:
        nearest = max(instances, batch_size - rest)
        raise InputError(
            f"a batch of {batch_size} images cannot be divided into classes of {instances}; "
            f"choose a multiple, such as --batch-size {nearest}"
        )
    return groups


def make_sampler(
    labels: np.ndarray,
    batch_size: int,
    *,
    instances: int = 0,
    repeat: bool = False,
    seed: int = 0,
) -> BatchSampler:
    """Shuffled batches, or with `instances` > 0 balanced ones (`repeat`: see `BalancedSampler`).

    Raises:
        InputError: the batch does not fit the data.
    """
    if instances:
        return BalancedSampler(labels, batch_size, instances, seed, repeat=repeat)
    return ShuffledSampler(len(labels), batch_size, seed)
