"""XBM (Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020), for losses on pairs."""

from __future__ import annotations

from flags import COUNT_OR_ZERO, Group, Need, Options, flag
from methods.base import Method

WANTED = Need("--memory-bank", lambda options: options.memory_bank > 0)


def refuses(options: Options) -> str:
    """Refuses settings in which a batch cannot be compared with remembered embeddings."""
    if options.mixup > 0:
        return (
            "--memory-bank cannot go with --mixup: a mixed image is of two classes, and what is "
            "remembered has one; leave one of them out"
        )
    if options.nb_clusters is not None:
        return (
            "--memory-bank cannot go with divide and conquer (--nb-clusters): each batch trains "
            "the dimensions of its own cluster, and the memory holds batches of all; leave one of "
            "them out"
        )
    return ""


# fmt: off
METHOD = Method(
    name="memory",
    title="memory bank",
    flags=(Group("XBM: cross-batch memory, for losses on pairs", (
        flag("--memory-bank", 0, COUNT_OR_ZERO,
             "compare each batch with the last N embeddings, not with itself alone", shown="none"),
        flag("--memory-bank-start", 0, COUNT_OR_ZERO,
             "training steps before it begins, while embeddings still move fast (its authors: "
             "1000)", need=WANTED),
    )),),
    wanted=WANTED.met,
    attach={"size": "memory_bank", "start": "memory_bank_start"},
    off={"memory_bank": 0, "memory_bank_start": 0},
    refuses=refuses,
)
