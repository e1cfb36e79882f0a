"""Retrieval tasks: queries, the gallery that they search in, and the K of R@K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

import dataset
import metrics
from dataset.base import ImageSet
from utils import InputError


@dataclass(frozen=True)
class Task:
    """One retrieval task: queries against themselves, or against a gallery.

    Attributes:
        ks: the K of R@K.
        group_name: what a group in `ImageSet.groups` is, if a second R@1 is to be measured that
            leaves each query's own group out of the gallery.
        official: whether to follow also the protocol of VehicleID's authors: one random image of
            each class is the gallery of all others.
        left_out: the number of queries and gallery images that could not be read.
        dims: the number of first entries of embeddings that are compared; None is all.
    """

    name: str
    queries: ImageSet
    gallery: ImageSet | None
    ks: tuple[int, ...]
    group_name: str | None = None
    official: bool = False
    left_out: int = 0
    dims: int | None = None

    @classmethod
    def published(
        cls,
        name: str,
        queries: ImageSet,
        gallery: ImageSet | None,
        protocol: dataset.Protocol,
        ks: Sequence[int] | None = None,
    ) -> Task:
        """A task with these K, or with those of the papers that the gallery is large enough for.

        Raises:
            InputError: a K exceeds the size of the gallery.
        """
        size = len(queries if gallery is None else gallery)
        wanted = ks or [k for k in protocol.ks if k <= size]
        try:
            metrics.check_ks(wanted, size)
        except ValueError as error:
            raise InputError(f"--ks: {name}: {error}") from error
        # Only VehicleID comes in lists of several sizes.
        official = bool(protocol.sizes)
        return cls(name, queries, gallery, tuple(wanted), protocol.group_name, official)

    def at(self, sizes: Sequence[int]) -> list[Task]:
        """One task for each number of dimensions that are compared; without sizes, this task."""
        return [replace(self, dims=size) for size in sizes] or [self]

    @property
    def title(self) -> str:
        """Its name in tables."""
        return self.name if self.dims is None else f"{self.name}, {self.dims} dimensions"

    def narrowed(self, queries: ImageSet, gallery: ImageSet | None) -> Task:
        """The same task, reduced to images that can be read."""
        before, after = (
            sum(len(side) for side in sides if side is not None)
            for sides in ((self.queries, self.gallery), (queries, gallery))
        )
        if before == after:
            return self
        left_out = self.left_out + before - after
        return replace(self, queries=queries, gallery=gallery, left_out=left_out)

    @property
    def without_match(self) -> int:
        """How many queries have no other image of their class to find."""
        searched = self.queries if self.gallery is None else self.gallery
        count = max(self.queries.num_classes, searched.num_classes)
        found = np.bincount(searched.labels, minlength=count) - (self.gallery is None)
        return int((found[self.queries.labels] < 1).sum())

    def describe(self) -> str:
        """The numbers of images and classes, in words."""
        text = f"{len(self.queries):,} images, {self.queries.num_classes:,} classes"
        return f"{text}, gallery {len(self.gallery):,} images" if self.gallery else text


def tasks_of(choice: dataset.Choice, ks: Sequence[int] | None = None) -> list[Task]:
    """The published evaluation of a data set; VehicleID has three, the large one first.

    Raises:
        InputError: the data set is unknown or not here, or a K exceeds a gallery.
    """
    name, protocol = choice.name, choice.protocol
    if choice.query_gallery:
        query, gallery = (choice.load(split) for split in ("query", "gallery"))
        return [Task.published(name, query, gallery, protocol, ks)]
    if protocol.sizes:
        lists = {size: choice.load("eval", size=size) for size in protocol.sizes}
        return [
            Task.published(f"{name} {size}", queries, None, protocol, ks)
            for size, queries in lists.items()
        ]
    return [Task.published(name, choice.load("eval"), None, protocol, ks)]


def on_the_same_images(tasks: Sequence[Task]) -> list[list[Task]]:
    """Groups successive tasks that differ only in `dims`."""
    groups = groupby(tasks, lambda task: (task.name, id(task.queries), id(task.gallery)))
    return [list(group) for _, group in groups]


def images_of(tasks: Sequence[Task]) -> list[ImageSet]:
    """The queries and galleries of the tasks."""
    return [side for task in tasks for side in (task.queries, task.gallery) if side is not None]
