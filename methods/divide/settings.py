"""The settings of divide and conquer, checked before training starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dataset.cluster_sampler import ClusterSampler
from flags import Options
from utils import InputError

PER_CLASS = 2
"""Images per class in a batch of one cluster, unless --IPC is given."""


@dataclass(frozen=True)
class Division:
    """How training images are divided; see the flags in __init__.py.

    Attributes:
        clusters: their number at the end.
        growing: whether it doubles from one on; otherwise all clusters exist from the start.
        period: epochs between two divisions.
        resting: epochs at the beginning of each period in which the backbone is frozen.
        full_from: the epoch from which the whole embedding is trained.
        stops: whether divisions and freezing end once all clusters exist.
        pooled: whether pooled features are clustered instead of embeddings.
        draws_from: the seed for drawing the seeds of k-means; None uses the same seed every time.
        sampler: labels (N,), clusters (N,) and the epoch in which these were made, `first_epoch` →
            the sampler of batches from one cluster each.
        lr, weight_decay: those of learned masks.
        first_mask_rests: whether the mask is frozen while there is only one cluster.

    Raises:
        InputError: settings that cannot work together.
    """

    clusters: int
    embedding_size: int
    growing: bool
    period: int
    resting: int
    full_from: int
    stops: bool
    pooled: bool
    draws_from: int | None
    adaptive: bool
    legacy_renumbering: bool
    sampler: Callable[..., ClusterSampler]
    learned_masks: bool
    lr: float
    weight_decay: float
    first_mask_rests: bool

    @classmethod
    def of(cls, options: Options) -> Division:
        """The settings of a run with these options."""
        return cls(
            clusters=options.nb_clusters,
            embedding_size=options.embedding_size,
            growing=options.hierarchy_method == "top_bot",
            period=options.mod_epoch,
            resting=options.mod_epoch_freeze,
            full_from=options.force_full_embedding_epoch,
            stops=options.stop_recluster,
            pooled=bool(options.penultimate_for_clusters),
            draws_from=options.clustering_random_state,
            adaptive=options.clustering_method == "kmeans_adaptive_centroids",
            legacy_renumbering=options.legacy_renumbering,
            sampler=partial(
                ClusterSampler,
                batch_size=options.batch_size,
                instances=options.IPC or PER_CLASS,
                kind=options.batch_sampler,
                small_class_action=options.small_class_action,
                replicas=options.num_replicas,
                seed=options.seed,
            ),
            learned_masks=not options.fixed_mask,
            lr=options.lr * options.mask_lr_mult,
            weight_decay=options.weight_decay * options.mask_wd_mult,
            first_mask_rests=bool(options.masks_freeze_one_cluster),
        )

    def __post_init__(self) -> None:
        final = self.clusters
        if final & (final - 1):
            raise InputError(
                f"--nb-clusters {final} must be a power of two (1, 2, 4, 8, …), because every mask "
                "is split in two until each cluster has one"
            )
        if self.resting >= self.period and final > 1:
            raise InputError(
                f"--mod-epoch-freeze {self.resting} freezes the backbone in all epochs of each "
                f"period of --mod-epoch {self.period}; choose less"
            )
        grown = self.period * (final.bit_length() - 1) if self.growing else 0
        if self.full_from <= grown and final > 1:
            raise InputError(
                f"--force-full-embedding-epoch {self.full_from} is too early: all {final} clusters "
                f"are there from epoch {grown} on; choose at least {grown + 1}"
            )
        if not self.learned_masks and final > self.embedding_size:
            raise InputError(
                f"--fixed-mask: {final} clusters cannot share {self.embedding_size} dimensions; "
                "raise --embedding-size or lower --nb-clusters"
            )
