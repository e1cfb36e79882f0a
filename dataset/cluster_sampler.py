"""The "conquer" of divide and conquer: batches from one cluster each, the clusters taking turns.

Sanakoyeu et al., TPAMI 2021; the "divide" is in clusters.py. Deviations from the authors' code: one
stream instead of a loader for each cluster; clusters with fewer images than a batch repeat them,
and clusters of a single class, which have no negatives, are left out (the authors' code fails on
both).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from dataset.samplers import BatchSampler, ImagesByClass, classes_in
from utils import InputError, nearest_names

logger = logging.getLogger("dataset")


class _Cluster:
    """The images of a cluster, by class.

    Each class has its images in random order and a cursor, so that all are used before any is used
    again. Orders and cursors are kept between batches and epochs.
    """

    def __init__(self, labels: np.ndarray, members: np.ndarray, rng: np.random.Generator) -> None:
        self.classes = ImagesByClass(labels, members)
        self.cursor = np.zeros(len(self.classes), np.int64)
        for c in range(len(self.classes)):
            rng.shuffle(self.classes.of(c))

    def __len__(self) -> int:
        return len(self.classes.members)

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the orders and cursors."""
        return self.classes.members.copy(), self.cursor.copy()

    def load_state(self, state: tuple[np.ndarray, np.ndarray]) -> None:
        """Restores the orders and cursors."""
        self.classes.members[:], self.cursor[:] = state

    def take(self, rng: np.random.Generator, c: int, count: int) -> np.ndarray:
        """The next `count` images of class `c`; random ones if fewer are left in its order."""
        images, cursor = self.classes.of(c), self.cursor[c]
        if cursor + count <= len(images):
            taken = images[cursor : cursor + count].copy()
        else:
            taken = self.classes.random(rng, c, count)
        self.cursor[c] += count
        if self.cursor[c] >= len(images):
            rng.shuffle(images)
            self.cursor[c] = 0
        return taken


SMALL_CLASS_ACTIONS = ("sample_other", "duplicate", "smaller_batch")


class ClusterSampler(BatchSampler):
    """Batches of one cluster each, round robin over the clusters.

    An epoch has as many rounds as the largest cluster has whole batches, at least one; smaller
    clusters start over. The class cursors depend on all epochs since `first_epoch`, so these are
    drawn again, without reading images, when a run is continued.

    Args:
        labels: (N,) classes. clusters: (N,) cluster of each image, -1 for images left out.
        batch_size: images per batch, replicas included. instances: images per class.
        kind: how a batch is made:
            "balanced_old": batch/instances classes, repeated only if the cluster has fewer;
            "adaptbalanced": the same without repetition: with few classes, more images of each;
            "randombatch": slices of a permutation, those of a single class left out;
            "npairs": classes and images drawn with replacement.
        small_class_action: what "adaptbalanced" does if a class is too small for its share:
            "sample_other" fills the batch with other images of the cluster, "duplicate" repeats the
            images of the class, "smaller_batch" leaves the batch smaller.
        replicas: how often a batch has each image ("adaptbalanced", "randombatch").
        first_epoch: the first epoch with these clusters.

    Attributes:
        skipped: clusters without a batch, because all of their images are of one class.

    Raises:
        InputError: an unknown name, sizes that do not divide, no room for a second class in a
            batch, or no cluster with two classes.
    """

    def __init__(
        self,
        labels: np.ndarray,
        clusters: np.ndarray,
        batch_size: int,
        instances: int,
        *,
        kind: str = "adaptbalanced",
        small_class_action: str = "sample_other",
        replicas: int = 1,
        seed: int = 0,
        first_epoch: int = 0,
    ) -> None:
        super().__init__(len(labels), batch_size, seed)
        labels, clusters = np.asarray(labels), np.asarray(clusters)
        self._makers = {
            "balanced_old": self._balanced,
            "adaptbalanced": self._adaptive,
            "randombatch": self._slices,
            "npairs": self._pairs,
        }
        _check_name("--batch-sampler", kind, self._makers)
        _check_name("--small-class-action", small_class_action, SMALL_CLASS_ACTIONS)
        _check_sizes(kind, batch_size, instances, replicas)
        self.kind = kind
        self.small_class_action = small_class_action
        self.replicas = replicas
        self.instances = instances
        self.distinct = batch_size // replicas
        rng = np.random.default_rng([seed % 2**63, first_epoch, 1])
        self._clusters, self.skipped = _usable(labels, clusters, rng)
        self._first_epoch = first_epoch
        self._states = {first_epoch: self._state()}

    @property
    def rounds(self) -> int:
        """The number of batches of each cluster in an epoch."""
        return max(1, max(map(len, self._clusters.values())) // self.batch_size)

    def __len__(self) -> int:
        return self.rounds * len(self._clusters)

    def draw(self, epoch: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """See `BatchSampler.draw`."""
        if epoch < self._first_epoch:
            raise ValueError(f"these clusters are for epoch {self._first_epoch} and later")
        known = max(known for known in self._states if known <= epoch)
        for earlier in range(known, epoch):
            for _ in self._epoch(earlier):
                pass
        yield from self._epoch(epoch)

    def _epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, int]]:
        start = self._states[epoch]
        for cluster, state in zip(self._clusters.values(), start, strict=True):
            cluster.load_state(state)
        rng = self.generator(epoch)
        batches = {number: self._forever(each, rng) for number, each in self._clusters.items()}
        for _ in range(self.rounds):
            for number, supply in batches.items():
                yield np.tile(next(supply), self.replicas), number
        first = self._states[self._first_epoch]
        self._states = {self._first_epoch: first, epoch: start, epoch + 1: self._state()}

    def _forever(self, cluster: _Cluster, rng: np.random.Generator) -> Iterator[np.ndarray]:
        while True:
            yield from self._makers[self.kind](cluster, rng)

    def _state(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [cluster.state() for cluster in self._clusters.values()]

    # -- one pass through a cluster, or a single batch if there are no passes

    def _balanced(self, cluster: _Cluster, rng: np.random.Generator) -> Iterator[np.ndarray]:
        groups = self.distinct // self.instances
        classes = len(cluster.classes)
        chosen = rng.choice(classes, groups, replace=classes < groups)
        yield np.concatenate([cluster.take(rng, c, self.instances) for c in chosen])

    def _adaptive(self, cluster: _Cluster, rng: np.random.Generator) -> Iterator[np.ndarray]:
        groups = min(self.distinct // self.instances, len(cluster.classes))
        chosen = rng.choice(len(cluster.classes), groups, replace=False)
        share, extra = divmod(self.distinct, groups)
        shares = np.full(groups, share)
        shares[rng.choice(groups, extra, replace=False)] += 1
        parts = []
        for c, wanted in zip(chosen, shares, strict=True):
            size = cluster.classes.sizes[c]
            repeats = self.small_class_action == "duplicate"
            parts.append(cluster.take(rng, c, wanted if repeats else min(wanted, size)))
        batch = np.concatenate(parts)
        if self.small_class_action == "sample_other":
            batch = _fill(batch, cluster.classes.members, self.distinct, rng)
        yield batch

    def _slices(self, cluster: _Cluster, rng: np.random.Generator) -> Iterator[np.ndarray]:
        members = cluster.classes.members
        class_of = np.repeat(np.arange(len(cluster.classes)), cluster.classes.sizes)
        order = rng.permutation(len(members))
        if len(order) < self.distinct:
            yield _fill(members[order], members, self.distinct, rng)
        for start in range(0, len(order) - self.distinct + 1, self.distinct):
            part = order[start : start + self.distinct]
            if (class_of[part] != class_of[part[0]]).any():
                yield members[part]

    def _pairs(self, cluster: _Cluster, rng: np.random.Generator) -> Iterator[np.ndarray]:
        chosen = rng.integers(len(cluster.classes), size=-(-self.distinct // self.instances))
        parts = [rng.choice(cluster.classes.of(c), self.instances) for c in chosen]
        yield np.concatenate(parts)[: self.distinct]


def _check_name(flag: str, name: str, known: Sequence[str] | dict) -> None:
    if name not in known:
        raise InputError(f"{flag} {name} does not exist; {nearest_names(name, known)}")


def _check_sizes(kind: str, batch_size: int, instances: int, replicas: int) -> None:
    """Raise InputError for a batch that cannot be divided, or has no room for two classes."""
    if replicas > 1 and kind in ("balanced_old", "npairs"):
        raise InputError(
            f"--num-replicas {replicas} has no effect with --batch-sampler {kind}; "
            "use adaptbalanced or randombatch"
        )
    if batch_size % replicas:
        raise InputError(
            f"--batch-size {batch_size} cannot be divided into {replicas} replicas; "
            "choose a multiple of --num-replicas"
        )
    distinct = batch_size // replicas
    if kind in ("balanced_old", "adaptbalanced"):
        classes_in(distinct, instances)
    if distinct <= (1 if kind == "randombatch" else instances):
        raise InputError(
            f"a batch of {batch_size} images ({instances} per class, {replicas} replicas) has "
            "no room for a second class; choose a larger --batch-size"
        )


def _usable(
    labels: np.ndarray, clusters: np.ndarray, rng: np.random.Generator
) -> tuple[dict[int, _Cluster], tuple[int, ...]]:
    """The clusters with images of at least two classes, by number, and the numbers of the others.

    Raises:
        InputError: there are no such clusters.
    """
    usable: dict[int, _Cluster] = {}
    skipped = []
    for number in np.unique(clusters[clusters >= 0]).tolist():
        members = np.flatnonzero(clusters == number)
        if len(np.unique(labels[members])) > 1:
            usable[number] = _Cluster(labels, members, rng)
        else:
            skipped.append(number)
    if not usable:
        raise InputError("no cluster holds images of two classes; use fewer --nb-clusters")
    if skipped:
        logger.warning(
            "clusters of a single class get no batch until the next clustering: %s",
            ", ".join(map(str, skipped)),
        )
    return usable, tuple(skipped)


def _fill(
    batch: np.ndarray, members: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """A batch filled to `count` images: with members not yet in it, then with repetitions."""
    others = np.setdiff1d(members, batch)
    missing = count - len(batch)
    drawn = rng.choice(others, min(missing, len(others)), replace=False)
    again = rng.choice(members, missing - len(drawn))
    return np.concatenate([batch, drawn, again])
