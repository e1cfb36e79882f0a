"""What methods do around the steps: warm up, mix images, divide and conquer.

The loop calls every routine in turn and knows none of them: before an epoch (`begin_epoch`), for a
batch (`prepare`, `views`, `context`), and when a run is saved and continued (`state_dict`).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import processes
from dataset.clusters import can_divide, divide, one_cluster
from dataset.loader import Batch
from dataset.samplers import ClusterSampler
from utils import InputError

PER_CLASS = 2
"""Images per class in a batch of one cluster, where --IPC does not say."""

if TYPE_CHECKING:
    from net import EmbeddingMasks
    from train import Training


class View(NamedTuple):
    """One forward of a step: images, and the weighted labels its loss is taken with."""

    images: torch.Tensor
    targets: list[tuple[torch.Tensor | float, torch.Tensor]]


class Routine:
    """Does nothing, everywhere a method may do something."""

    def begin_epoch(self, training: Training) -> None:
        """Called before the first batch of an epoch."""

    def prepare(self, batch: Batch) -> Batch:
        """May change a batch."""
        return batch

    def views(self, batch: Batch, views: list[View]) -> list[View]:
        """May add forwards to a step; `views` holds those so far, first the batch itself."""
        return views

    def context(self) -> dict[str, Any]:
        """What the objective is told besides outputs and labels."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any], training: Training) -> None:
        """Continues from `state_dict()`; called before network and optimisers load theirs."""

    def resume(self, training: Training) -> None:
        """Called instead of `begin_epoch` when a run continues inside an epoch."""


class Warmup(Routine):
    """Only the heads and the criterion train in the first epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def begin_epoch(self, training: Training) -> None:
        """Freezes or releases the backbone."""
        training.network.freeze_backbone(training.clock.epoch < self.epochs)

    resume = begin_epoch


class Mixup(Routine):
    """Mixup of images, as introspective learning uses it: a second forward a step.

    λ ~ Beta(α, α), x' = λx + (1-λ)x[π], and the step's loss becomes
    L(x, y) + λ·L(x', y) + (1-λ)·L(x', y[π]).
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def views(self, batch: Batch, views: list[View]) -> list[View]:
        """Adds the mixed images."""
        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        order = torch.randperm(len(batch.labels)).to(batch.labels.device)
        partners = order[processes.shard(len(order))]
        images = processes.gather_rows(batch.images, len(order))
        mixed = torch.lerp(images[partners], batch.images, share)
        targets = [(share, batch.labels), (1 - share, batch.labels[order])]
        return [*views, View(mixed, targets)]


class DivideAndConquer(Routine):
    """Clusters the training images every few epochs; each cluster trains the embedding's own part.

    The number of clusters doubles at each division up to `final`; batches come from one cluster
    each; the backbone rests in the first `freeze` epochs of every period; from epoch `full_from` on
    the whole embedding trains, without masks.

    Deviations from the released code: one division in epoch 0, not two of the same images; one
    cluster is not computed; masks double when the clusters do, not at the next batch; the backbone
    gets its own learning rate back, not that of the heads.

    Args:
        args: the options; see their group in options.py.
        labels: (N,) classes of the training images.

    Raises:
        InputError: options that cannot work together, or too few images for the clusters.
    """

    def __init__(self, args: argparse.Namespace, labels: np.ndarray) -> None:
        _check_division(args)
        _check_data(args.nb_clusters, labels)
        self.args = args
        self.labels = labels
        self.final = args.nb_clusters
        self.full_from = args.force_full_embedding_epoch
        self.clusters: np.ndarray | None = None
        self.count = self.final if args.hierarchy_method == "none" else 1
        self.divided_at = 0
        self.stopped = False
        self.full = False
        self._masks: EmbeddingMasks | None = None
        self._sampler: ClusterSampler | None = None
        self._seeds = (
            None
            if args.clustering_random_state is None
            else np.random.RandomState(args.clustering_random_state)
        )

    def begin_epoch(self, training: Training) -> None:
        """Divides when it is time, and sets what rests in this epoch."""
        epoch = training.clock.epoch
        self.stopped = self.stopped or self._stops(epoch)
        divides = self.final > 1 and not self.stopped and epoch % self.args.mod_epoch == 0
        if epoch == 0 or divides:
            self._divide(training)
        self.resume(training)

    def _stops(self, epoch: int) -> bool:
        """Whether nothing is divided and nothing rests any more, by --stop-recluster."""
        if not self.args.stop_recluster or self.count < self.final:
            return False
        return self.args.hierarchy_method == "top_bot" or epoch >= self.args.mod_epoch_freeze

    def _divide(self, training: Training) -> None:
        grows = training.clock.epoch > 0 and self.count < self.final
        if self.count == 1 and not grows:
            self.clusters = one_cluster(self.labels)
        else:
            pooled = bool(self.args.penultimate_for_clusters)
            features = F.normalize(training.embed_training_images(pooled=pooled))
            divided = partial(
                divide,
                features,
                self.labels,
                self.count,
                1234 if self._seeds is None else int(self._seeds.randint(999999)),
                previous=self.clusters,
                split=grows,
                adaptive=self.args.clustering_method == "kmeans_adaptive_centroids",
                legacy=self.args.legacy_renumbering,
            )
            self.clusters = processes.from_main(divided)
        self.count *= 2 if grows else 1
        self.divided_at = training.clock.epoch
        self._sampler = None
        self._grow_masks(training)

    def _grow_masks(self, training: Training) -> None:
        masks = training.network.masks
        if len(masks) == self.count:
            return
        while len(masks) < self.count:
            masks.split()
        training.optimisers.replace("masks", list(masks.parameters()))

    def resume(self, training: Training) -> None:
        """Sampler, resting backbone and the masks' phase, from the state alone."""
        epoch, args = training.clock.epoch, self.args
        if self._sampler is None:
            self._sampler = cluster_sampler(args, self.labels, self.clusters, self.divided_at)
        training.loader.set_sampler(self._sampler)
        resting = self.final > 1 and not self.stopped
        resting = resting and epoch % args.mod_epoch < args.mod_epoch_freeze
        training.optimisers.hold("backbone", 0.0 if resting else 1.0)
        first = args.masks_freeze_one_cluster and self.count == 1
        training.optimisers.hold("masks", 0.0 if first else 1.0)
        self._masks = training.network.masks
        self.full = epoch >= self.full_from
        if self.full:
            self._end_masks(training)

    @staticmethod
    def _end_masks(training: Training) -> None:
        training.network.masks.freeze()
        training.optimisers.replace("masks", [])

    def prepare(self, batch: Batch) -> Batch:
        """In the full phase a batch belongs to no cluster."""
        return batch._replace(cluster=None) if self.full else batch

    def context(self) -> dict[str, Any]:
        """The masks, while they train."""
        return {"masks": None if self.full else processes.once(self._masks.weight)}

    def state_dict(self) -> dict[str, Any]:
        """Division, number of clusters, phase and the state of the seeds."""
        seeds = None
        if self._seeds is not None:
            name, keys, position, has_gauss, cached = self._seeds.get_state()
            seeds = [name, keys.tolist(), position, has_gauss, cached]
        return {
            "clusters": None if self.clusters is None else torch.from_numpy(self.clusters),
            "count": self.count,
            "divided_at": self.divided_at,
            "stopped": self.stopped,
            "full": self.full,
            "seeds": seeds,
        }

    def load_state_dict(self, state: dict[str, Any], training: Training) -> None:
        """Makes as many masks as there were, so that their values and moments can be loaded."""
        self.clusters = None if state["clusters"] is None else state["clusters"].numpy()
        for name in ("count", "divided_at", "stopped", "full"):
            setattr(self, name, state[name])
        if state["seeds"] is not None:
            name, keys, position, has_gauss, cached = state["seeds"]
            self._seeds.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
        self._sampler = None
        self._grow_masks(training)
        if self.full:
            self._end_masks(training)


def cluster_sampler(
    args: argparse.Namespace, labels: np.ndarray, clusters: np.ndarray, first_epoch: int = 0
) -> ClusterSampler:
    """Batches of one cluster each, as the options say, for a division made in `first_epoch`.

    Raises:
        InputError: the batch size does not suit the images per class, the replicas or the data.
    """
    return ClusterSampler(
        labels,
        clusters,
        args.batch_size,
        args.IPC or PER_CLASS,
        kind=args.batch_sampler,
        small_class_action=args.small_class_action,
        replicas=args.num_replicas,
        seed=args.seed,
        first_epoch=first_epoch,
    )


def _check_division(args: argparse.Namespace) -> None:
    final, growing = args.nb_clusters, args.hierarchy_method == "top_bot"
    if final & (final - 1):
        raise InputError(
            f"--nb-clusters {final} must be a power of two (1, 2, 4, 8, …), because every mask is "
            "split in two until each cluster has one"
        )
    if args.mod_epoch_freeze >= args.mod_epoch and final > 1:
        raise InputError(
            f"--mod-epoch-freeze {args.mod_epoch_freeze} leaves the backbone no epoch of each "
            f"period of --mod-epoch {args.mod_epoch}; choose less"
        )
    grown = args.mod_epoch * (final.bit_length() - 1) if growing else 0
    if args.force_full_embedding_epoch <= grown and final > 1:
        raise InputError(
            f"--force-full-embedding-epoch {args.force_full_embedding_epoch} is too early: all "
            f"{final} clusters are there from epoch {grown} on; choose at least {grown + 1}"
        )
    if args.fixed_mask and final > args.embedding_size:
        raise InputError(
            f"--fixed-mask: {final} clusters cannot share {args.embedding_size} dimensions; "
            "raise --embedding-size or lower --nb-clusters"
        )


def _check_data(final: int, labels: np.ndarray) -> None:
    possible = final
    while possible and not can_divide(labels, possible):
        possible //= 2
    if possible < final:
        raise InputError(
            f"--nb-clusters {final}: each cluster needs two classes with two images each, for "
            f"which the {len(labels)} training images are too few; "
            + (f"choose at most {possible}" if possible else "add images to their classes")
        )
