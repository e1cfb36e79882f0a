"""What methods do around the steps: warm up, mix images, divide and conquer.

The loop calls every routine in turn and knows none of them: before an epoch (`begin_epoch`), for a
batch (`prepare`, `views`, `context`), and when a run is saved and continued (`state_dict`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dataset.clusters import divide
from dataset.loader import Batch
from dataset.samplers import ClusterSampler
from utils import InputError

if TYPE_CHECKING:
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
        mixed = torch.lerp(batch.images[order], batch.images, share)
        targets = [(share, batch.labels), (1 - share, batch.labels[order])]
        return [*views, View(mixed, targets)]


class DivideAndConquer(Routine):
    """Clusters the training images every few epochs; each cluster trains the embedding's own part.

    The number of clusters doubles at each division up to `final`; batches come from one cluster
    each; the backbone rests in the first `freeze` epochs of every period; from epoch `full_from` on
    the whole embedding trains, without masks.

    Args:
        args: the options; see their group in options.py.

    Raises:
        InputError: options that cannot work together.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.final = args.nb_clusters
        self.full_from = args.force_full_embedding_epoch
        self.clusters: np.ndarray | None = None
        self.count = self.final if args.hierarchy_method == "none" else 1
        self.divided_at = 0
        self.stopped = False
        self.full = False
        self._masks: Callable[[], torch.Tensor] | None = None
        self._seeds = (
            None
            if args.clustering_random_state is None
            else np.random.RandomState(args.clustering_random_state)
        )
        _check_division(args)

    def begin_epoch(self, training: Training) -> None:
        """Divides when it is time, and sets what rests in this epoch."""
        epoch, args = training.clock.epoch, self.args
        if args.stop_recluster and self.count == self.final and epoch > self.divided_at:
            self.stopped = True
        dividing = self.final > 1 and not self.stopped and epoch % args.mod_epoch == 0
        if epoch == 0 or dividing:
            self._divide(training, epoch)
        self.resume(training)

    def _divide(self, training: Training, epoch: int) -> None:
        grows = epoch > 0 and self.count < self.final
        train = training.data.train
        features = training.embed_training_images(pooled=bool(self.args.penultimate_for_clusters))
        self.clusters = divide(
            F.normalize(features),
            train.labels,
            self.count,
            1234 if self._seeds is None else int(self._seeds.randint(999999)),
            previous=self.clusters,
            split=grows,
            legacy=self.args.legacy_renumbering,
        )
        self.count *= 2 if grows else 1
        self.divided_at = epoch
        self._grow_masks(training)

    def _grow_masks(self, training: Training) -> None:
        masks = training.network.masks
        while len(masks) < self.count:
            masks.split()
        training.optimisers.replace("masks", list(masks.parameters()))

    def resume(self, training: Training) -> None:
        """Sampler, resting backbone and the masks' phase, from the state alone."""
        epoch, args = training.clock.epoch, self.args
        training.loader.set_sampler(
            ClusterSampler(
                training.data.train.labels,
                self.clusters,
                args.batch_size,
                args.IPC or 2,
                kind=args.batch_sampler,
                small_class_action=args.small_class_action,
                replicas=args.num_replicas,
                seed=args.seed,
                first_epoch=self.divided_at,
            )
        )
        resting = self.final > 1 and not self.stopped
        resting = resting and epoch % args.mod_epoch < args.mod_epoch_freeze
        training.optimisers.hold("backbone", 0.0 if resting else 1.0)
        first = args.masks_freeze_one_cluster and self.count == 1
        training.optimisers.hold("masks", 0.0 if first else 1.0)
        self.full = epoch >= self.full_from
        if self.full:
            training.network.masks.freeze()
            training.optimisers.replace("masks", [])
        self._masks = lambda: training.network.masks.weight

    def prepare(self, batch: Batch) -> Batch:
        """In the full phase a batch belongs to no cluster."""
        return batch._replace(cluster=None) if self.full else batch

    def context(self) -> dict[str, Any]:
        """The masks, while there are several and they train."""
        regularised = self._masks is not None and not self.full and self.count > 1
        return {"masks": self._masks() if regularised else None}

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
        self._grow_masks(training)
        if self.full:
            training.network.masks.freeze()
            training.optimisers.replace("masks", [])


def _check_division(args: argparse.Namespace) -> None:
    final, growing = args.nb_clusters, args.hierarchy_method == "top_bot"
    if growing and final & (final - 1):
        raise InputError(
            f"--nb-clusters {final}: clusters double until there are enough, so it must be a power "
            "of two (1, 2, 4, 8, …), or take --hierarchy-method none"
        )
    if args.mod_epoch_freeze >= args.mod_epoch and final > 1:
        raise InputError(
            f"--mod-epoch-freeze {args.mod_epoch_freeze} leaves the backbone no epoch of each "
            f"period of --mod-epoch {args.mod_epoch}; choose less"
        )
    grown = args.mod_epoch * (final.bit_length() - 1) if growing else 0
    if args.force_full_embedding_epoch <= grown and final > 1:
        raise InputError(
            f"--force-full-embedding-epoch {args.force_full_embedding_epoch} comes before the last "
            f"doubling of {final} clusters in epoch {grown}; choose at least {grown + 1}"
        )
    if args.fixed_mask and final > args.embedding_size:
        raise InputError(
            f"--fixed-mask: {final} clusters cannot share {args.embedding_size} dimensions; "
            "raise --embedding-size or lower --nb-clusters"
        )
