"""Divide and conquer (Sanakoyeu et al., CVPR 2019 and TPAMI 2021), for any loss: flags and record.

The routine is in routine.py, the clustering in dataset/clusters.py, the masks in net/masks.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import net
from flags import (
    BINARY,
    COUNT,
    COUNT_OR_ZERO,
    EPOCHS,
    NOTHING,
    SWITCH,
    Flag,
    Group,
    Kind,
    Need,
    Options,
    Search,
    any_text,
    flag,
    not_negative,
    one_of,
    whole,
)
from methods.base import Method, Routine
from methods.divide.settings import PER_CLASS, Division

if TYPE_CHECKING:
    import numpy as np

    from dataset.samplers import BatchSampler
    from net import EmbeddingMasks

DIVIDED = Need(
    "divide and conquer (--nb-clusters)", lambda options: options.nb_clusters is not None
)
LEARNED = Need(
    "divide and conquer with masks that are learned (--nb-clusters, without --fixed-mask 1)",
    lambda options: DIVIDED.met(options) and not options.fixed_mask,
)
ADAPTIVE = Need(
    "--batch-sampler adaptbalanced", lambda options: options.batch_sampler == "adaptbalanced"
)
MASKS_SUMMED = Need("--masks-sum-for-full-emb 1", lambda options: options.masks_sum_for_full_emb)


def hierarchy(text: str) -> str:
    """`bot_top` is the same as `none`: the released code never reaches its branch for it."""
    return "none" if text == "bot_top" else text


def dead(spellings: str, default: Any, kind: Kind, help: str) -> Flag:
    """A flag of the released command that has no effect."""
    return flag(spellings, default, kind, help, need=DIVIDED, change=NOTHING, dead=True)


# fmt: off
FLAGS = Group("divide and conquer, for any loss", (
    flag("--experiment", None, one_of("margin_loss_resnet50"),
         "the released code's defaults: ResNet-50, MarginLoss, Adam, …"),
    flag("--nb-clusters", None, COUNT, "clusters at the end; each has a mask on the embedding",
         shown="off; 1 with --experiment"),
    flag("--mod-epoch", 2, EPOCHS, "epochs between two divisions", need=DIVIDED),
    flag("--mod-epoch-freeze", 0, Kind(whole(0), "EPOCHS"),
         "epochs at the beginning of each period in which the backbone is frozen", need=DIVIDED),
    flag("--force-full-embedding-epoch", 10**6, Kind(whole(0), "EPOCH"),
         "from this epoch on no masks: the whole embedding trains", need=DIVIDED, shown="never"),
    flag("--hierarchy-method", "top_bot", Kind(hierarchy, choices=("top_bot", "none")),
         "top_bot: 1, 2, 4, … clusters; none: all from the start (bot_top too, as released)",
         need=DIVIDED),
    flag("--stop-recluster", False, SWITCH,
         "no more division and freezing once there are all clusters", need=DIVIDED),
    flag("--penultimate-for-clusters", 1, BINARY,
         "cluster pooled features (1) or embeddings (0)", need=DIVIDED),
    flag("--clustering-random-state -crs", None, COUNT_OR_ZERO,
         "draws another seed for each k-means", need=DIVIDED, shown="the same each time"),
    flag("--clustering-method", "kmeans",
         Kind(str, "NAME", ("kmeans", "kmeans_adaptive_centroids")),
         "kmeans starts afresh at each division, kmeans_adaptive_centroids at the means of the "
         "clusters before", need=DIVIDED),
    flag("--legacy-renumbering", False, SWITCH,
         "apply the Hungarian permutation the wrong way round, as the released code does",
         need=DIVIDED),
    flag("--batch-sampler", "balanced_old",
         one_of("balanced_old", "adaptbalanced", "npairs", "randombatch"),
         "how a batch is drawn from a cluster", need=DIVIDED),
    flag("--small-class-action", "sample_other",
         one_of("sample_other", "duplicate", "smaller_batch"),
         "adaptbalanced, where a class has too few images", need=ADAPTIVE),
    flag("--num-replicas", 1, COUNT, "how often a batch holds each image", need=DIVIDED),
    flag("--fixed-mask", 0, BINARY, "1: binary masks that divide the dimensions", need=DIVIDED),
    flag("--mask-lr-mult", 1.0, not_negative("X"),
         "learning rate of the masks as a multiple of --lr", need=LEARNED),
    flag("--mask-wd-mult", 0.0, not_negative("X"),
         "weight decay of the masks as a multiple of --weight-decay", need=LEARNED),
    flag("--mask-relu", 1, BINARY, "masks act through a ReLU", need=LEARNED),
    flag("--masking-init", "ones", one_of(*net.MASK_INITS), "start of the masks", need=LEARNED),
    flag("--masking-lambda", 1.0, not_negative("W"), "weight of the masks' mean cosine",
         need=LEARNED, search=Search(1e-3, 1)),
    flag("--masks-freeze-one-cluster", 0, BINARY,
         "1: the mask is frozen while there is one cluster", need=LEARNED),
    flag("--masks-sum-for-full-emb", 0, BINARY,
         "1: the sum of the masks multiplies the embedding at test time", need=DIVIDED),
    flag("--masks-normalize-before-sum", None, one_of("l1"),
         "scale each mask before that sum", need=MASKS_SUMMED, shown="off"),
))
DEAD_FLAGS = Group("accepted because published commands have them; they change nothing", (
    dead("--backend", None, one_of("faiss", "faiss-gpu", "torch+sklearn"),
         "library for k-means; here there is one k-means of our own"),
    dead("--lr-gamma", None, any_text("X"),
         "never used by the released code; its rates are constant"),
    dead("--lr-step", None, any_text("X"), "never used by the released code"),
    dead("--emb-lr-mult", None, any_text("X"), "the released code stops at any value but 1"),
    dead("--with-l1", False, SWITCH, "never used by the released code"),
    dead("--init-clusters", None, any_text("N"), "never used by the released code"),
    dead("--reset-learners-fix", None, any_text("N"), "the released code crashes without it"),
    dead("--save-model", None, any_text("N"), "the best and the last checkpoint are always kept"),
    dead("--save-masks", None, any_text("N"), "the masks are in both checkpoints"),
    dead("--is-debug", False, SWITCH, "the mean cosine of the masks is always logged"),
    dead("--verbose", False, SWITCH, "the released code prints more with it"),
    dead("--wandb-enabled", False, SWITCH, "Weights & Biases is on, unless --wandb disabled"),
))
# fmt: on


def authors_settings(options: Options) -> dict[str, Any]:
    """The defaults of the released experiment file; without it, only IPC if there are clusters."""
    if options.experiment is None:
        per_class = options.IPC or PER_CLASS
        return {} if options.nb_clusters is None else {"IPC": per_class}
    return {
        "model": "resnet50", "loss": "MarginLoss", "nb_clusters": 1, "epochs": 100,
        "optimizer": "adam", "lr": 1e-5, "weight_decay": 1e-3, "batch_size": 128, "IPC": 4,
        "schedule": "constant", "warm": 0, "clip": 0.0, "pooling": "avg", "head_init": "default",
        "dropout": 0.01, "bn_freeze": _bn_freeze(options), "dataset": "cub",
    }  # fmt: skip


def _bn_freeze(options: Options) -> str:
    """The released code freezes BatchNorm statistics of ResNets, but of no other network."""
    name = net.find_backbone(options.model).name if "model" in options.given else "resnet50"
    return "statistics" if name.startswith("resnet") else "0"


def architecture(options: Options) -> dict[str, Any]:
    """A head that is initialised in as many parts as there are clusters."""
    return {"head_parts": options.nb_clusters} if DIVIDED.met(options) else {}


def new_masks(options: Options) -> EmbeddingMasks | None:
    """The single mask at the start of a run; None without divide and conquer."""
    if not DIVIDED.met(options):
        return None
    at_test = options.masks_normalize_before_sum or "sum"
    return net.EmbeddingMasks(
        options.embedding_size,
        learned=not options.fixed_mask,
        relu=bool(options.mask_relu),
        init=options.masking_init,
        full=at_test if options.masks_sum_for_full_emb else "none",
    )


def routine(options: Options, labels: np.ndarray) -> Routine:
    """The routine that divides the training images every few epochs."""
    from methods.divide.routine import DivideAndConquer

    return DivideAndConquer(Division.of(options), labels)


def sampler(options: Options, labels: np.ndarray) -> BatchSampler:
    """The sampler of the start, when all images are one cluster."""
    from dataset.clusters import one_cluster

    return Division.of(options).sampler(labels, one_cluster(labels))


METHOD = Method(
    name="masks",
    title="divide and conquer",
    flags=(FLAGS, DEAD_FLAGS),
    wanted=DIVIDED.met,
    attach={"weight": "masking_lambda"},
    off={"nb_clusters": None},
    defaults=authors_settings,
    architecture=architecture,
    masks=new_masks,
    routine=routine,
    sampler=sampler,
)
