"""A run's checkpoints and training images, for the sections of its page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dataset.base import ImageSet
from evaluation.embedding import Embedded
from page.findings import Search
from page.records import Record
from page.thumbnails import Thumbnails
from utils import InputError

DRAWN_IMAGES, IMAGES_PER_CLASS = 1500, 12
STRIP = 2**24  # cosines of proxies that are in memory at once: 64 MiB
COMPARED = 50_000  # proxies that are compared with each other; the time grows with their square
Section = dict[str, Any]


@dataclass(frozen=True)
class Learned:
    """A run's checkpoints and images, for the sections of its page.

    Attributes:
        checkpoint: the best one. state: last.pth. history: classes.npz. The last two may be empty.
        train: the training images, with their classes numbered as in the criterion; None if they
            are not available.
        embed: images → those that can be read, and their raw embeddings (n, d) by the best network.
    """

    record: Record
    checkpoint: dict[str, Any]
    state: dict[str, Any]
    history: dict[str, np.ndarray]
    judged: Embedded
    search: Search
    train: ImageSet | None
    embed: Callable[[ImageSet], tuple[ImageSet, torch.Tensor]] | None
    thumbs: Thumbnails
    seed: int

    def criterion(self, name: str) -> torch.Tensor | None:
        """A tensor of the criterion in the best checkpoint, by the last part of its key."""
        content = self.checkpoint.get("criterion_state_dict", {})
        return next((v for k, v in content.items() if k.split(".")[-1] == name), None)

    @cached_property
    def proxies(self) -> torch.Tensor | None:
        """(C, d) the proxies at unit length; for a class with several, their mean direction.

        None without proxies, or with fewer than two classes, or if the proxies cannot be divided
        evenly among the classes.
        """
        weights, names = self.criterion("proxies"), self.history.get("names")
        if weights is None or weights.ndim != 2 or len(weights) < 2:
            return None
        if names is not None and len(weights) != len(names):
            if len(names) < 2 or len(weights) % len(names):
                return None
            # The proxies of a class are consecutive.
            weights = F.normalize(weights.float(), dim=1).unflatten(0, (len(names), -1)).mean(dim=1)
        return F.normalize(weights.float(), dim=1)

    @property
    def few_proxies(self) -> torch.Tensor | None:
        """(C, d) `proxies` that can be compared with each other; None if more than `COMPARED`."""
        return None if self.proxies is None or len(self.proxies) > COMPARED else self.proxies

    @cached_property
    def crowding(self) -> torch.Tensor | None:
        """(C,) the cosine of each class's proxy to the nearest other one; of `few_proxies`."""
        return None if self.few_proxies is None else nearest_proxy(self.few_proxies)

    @cached_property
    def drawn(self) -> dict[int, torch.Tensor]:
        """`means` of classes drawn at random, on which statements about classes are based."""
        if self.train is None:
            return {}
        rng = np.random.default_rng(self.seed)
        chosen, images = [], 0
        sizes = np.bincount(self.train.labels, minlength=self.train.num_classes)
        for label in rng.permutation(self.train.num_classes).tolist():
            if images >= DRAWN_IMAGES:
                break
            chosen.append(label)
            images += min(IMAGES_PER_CLASS, int(sizes[label]))
        return self.means(chosen)

    def means(self, labels: Iterable[int]) -> dict[int, torch.Tensor]:
        """The mean (d,) of the unit embeddings of a dozen training images of each class.

        Classes with fewer than two readable images are left out; {} without training images.
        """
        if self.train is None or self.embed is None:
            return {}
        places = [np.flatnonzero(self.train.labels == c)[:IMAGES_PER_CLASS] for c in labels]
        if not places:
            return {}
        try:
            images, rows = self.embed(self.train.subset(np.concatenate(places)))
        except InputError:  # too many images cannot be read (any more)
            return {}
        unit = F.normalize(rows.float().cpu(), dim=1)
        found = {}
        for label, count in zip(*np.unique(images.labels, return_counts=True), strict=True):
            if count > 1:
                found[int(label)] = unit[torch.from_numpy(images.labels == label)].mean(dim=0)
        return found

    def class_name(self, label: int) -> str:
        """The name of a training class."""
        names = self.history.get("names")
        return f"class {label}" if names is None else str(names[label])

    def class_images(self, label: int, count: int, *, needed: bool = True) -> list[int]:
        """Thumbnails of the first images of a training class."""
        if self.train is None:
            return []
        own = np.flatnonzero(self.train.labels == label)[:count]
        return [self.thumbs.want(self.train, index, needed=needed) for index in own]


def nearest_proxy(proxies: torch.Tensor) -> torch.Tensor:
    """(C,) the cosine of each proxy of (C, d) to the nearest other one."""
    unit = F.normalize(proxies.float(), dim=1)
    best = []
    size = min(1024, max(1, STRIP // max(1, len(unit))))
    for rows in torch.arange(len(unit)).split(size):
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        best.append(similarity.amax(dim=1))
    return torch.cat(best)


def short(value: Any) -> float | None:
    """A number with four significant digits, as a page shows it."""
    return None if value is None else float(f"{float(value):.4g}")
