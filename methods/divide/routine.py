"""What divide and conquer does around the steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

import processes
from dataset.cluster_sampler import ClusterSampler
from dataset.clusters import can_divide, divide, one_cluster
from dataset.loader import Batch
from methods.base import Loop, Routine
from methods.divide.settings import Division
from utils import InputError

if TYPE_CHECKING:
    from criteria.base import ParameterGroup
    from net import EmbeddingMasks

SEED = 1234
"""The seed of every k-means, unless seeds are drawn; the same as in the released code."""


class DivideAndConquer(Routine):
    """Clusters the training images every few epochs; each cluster trains its part of the embedding.

    The number of clusters doubles at each division up to `division.clusters`. Every batch comes
    from one cluster. The backbone is frozen in the first epochs of every period. In the full phase
    the whole embedding is trained, without masks.

    Deviations from the released code: epoch 0 has one division instead of two of the same images;
    k-means is not run for a single cluster; the number of masks doubles together with the clusters
    and not at the next batch; after being frozen, the backbone returns to its own learning rate and
    not to that of the heads.

    Args:
        division: the settings.
        labels: (N,) classes of the training images.

    Raises:
        InputError: too few images for the clusters.
    """

    def __init__(self, division: Division, labels: np.ndarray) -> None:
        _check_data(division.clusters, labels)
        self.division = division
        self.labels = labels
        self.clusters: np.ndarray | None = None
        self.count = 1 if division.growing else division.clusters
        self.divided_at = 0
        self.stopped = False
        self.full = False
        self._masks: EmbeddingMasks | None = None
        self._sampler: ClusterSampler | None = None
        drawn = division.draws_from
        self._seeds = None if drawn is None else np.random.RandomState(drawn)

    def parameter_groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        """Gives the masks their own rate and weight decay; fixed masks get 0 for both."""
        learned = self.division.learned_masks
        own = {
            "lr": self.division.lr * learned,
            "weight_decay": self.division.weight_decay * learned,
        }
        return [{**group, **own} if group["name"] == "masks" else group for group in groups]

    def begin_epoch(self, loop: Loop) -> None:
        """Divides the images if a division is due, and sets up the epoch."""
        self.stopped = self.stopped or self._stops(loop.epoch)
        due = loop.epoch % self.division.period == 0
        if loop.epoch == 0 or (due and not self.stopped and self.division.clusters > 1):
            self.divide_anew(loop)
        self.resume(loop)

    def _stops(self, epoch: int) -> bool:
        """Whether --stop-recluster ends all further divisions and freezing of the backbone."""
        if not self.division.stops or self.count < self.division.clusters:
            return False
        return self.division.growing or epoch >= self.division.resting

    def divide_anew(self, loop: Loop) -> None:
        """Clusters the images by their current features; doubles the clusters until all exist."""
        grows = loop.epoch > 0 and self.count < self.division.clusters
        if self.count == 1 and not grows:
            self.clusters = one_cluster(self.labels)
        else:
            features = F.normalize(loop.embed_training_images(pooled=self.division.pooled))
            divided = partial(
                divide,
                features,
                self.labels,
                self.count,
                SEED if self._seeds is None else int(self._seeds.randint(999999)),
                previous=self.clusters,
                split=grows,
                adaptive=self.division.adaptive,
                legacy=self.division.legacy_renumbering,
            )
            self.clusters = processes.from_main(divided)
        self.count *= 2 if grows else 1
        self.divided_at = loop.epoch
        self._sampler = None
        self._grow_masks(loop)

    def _grow_masks(self, loop: Loop) -> None:
        masks = loop.network.masks
        if len(masks) == self.count:
            return
        while len(masks) < self.count:
            masks.split()
        loop.optimisers.replace("masks", list(masks.parameters()))

    def resume(self, loop: Loop) -> None:
        """Sets the sampler, and freezes or unfreezes backbone and masks, for this epoch."""
        division, epoch = self.division, loop.epoch
        if self._sampler is None:
            since = self.divided_at
            self._sampler = division.sampler(self.labels, self.clusters, first_epoch=since)
        loop.loader.set_sampler(self._sampler)
        resting = division.clusters > 1 and not self.stopped
        resting = resting and epoch % division.period < division.resting
        loop.optimisers.hold("backbone", 0.0 if resting else 1.0)
        first = division.first_mask_rests and self.count == 1
        loop.optimisers.hold("masks", 0.0 if first else 1.0)
        self._masks = loop.network.masks
        self.full = epoch >= division.full_from
        if self.full:
            self._end_masks(loop)

    @staticmethod
    def _end_masks(loop: Loop) -> None:
        loop.network.masks.freeze()
        loop.optimisers.replace("masks", [])

    def prepare(self, batch: Batch) -> Batch:
        """Removes the batch's cluster in the full phase."""
        return batch._replace(cluster=None) if self.full else batch

    def context(self) -> dict[str, Any]:
        """The masks as `masks`, or None in the full phase."""
        return {"masks": None if self.full else processes.once(self._masks.weight)}

    def state_dict(self) -> dict[str, Any]:
        """The division, number of clusters, phase, and state of the seeds' generator."""
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

    def load_state_dict(self, state: dict[str, Any], loop: Loop) -> None:
        """Restores the state, and the number of masks, so that their values can be loaded."""
        self.clusters = None if state["clusters"] is None else state["clusters"].numpy()
        for name in ("count", "divided_at", "stopped", "full"):
            setattr(self, name, state[name])
        if state["seeds"] is not None:
            name, keys, position, has_gauss, cached = state["seeds"]
            self._seeds.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
        self._sampler = None
        self._grow_masks(loop)
        if self.full:
            self._end_masks(loop)


def _check_data(final: int, labels: np.ndarray) -> None:
    possible = final
    while possible and not can_divide(labels, possible):
        possible //= 2
    if possible < final:
        raise InputError(
            f"--nb-clusters {final}: each cluster needs two classes with two images each, and the "
            f"{len(labels)} training images are too few for that; "
            + (f"choose at most {possible}" if possible else "add images to their classes")
        )
