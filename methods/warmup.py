"""Warm-up: only the heads and the criterion train in the first epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import net
from flags import COUNT_OR_ZERO, Group, Need, flag
from methods.base import Loop, Method, Routine

if TYPE_CHECKING:
    from net import EmbeddingNet


class Warmup(Routine):
    """Keeps the backbone frozen in the first `epochs`."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def start(self, network: EmbeddingNet) -> None:
        """Freezes the backbone."""
        network.freeze_backbone(True)

    def begin_epoch(self, loop: Loop) -> None:
        """Unfreezes the backbone after the warm-up."""
        loop.network.freeze_backbone(loop.epoch < self.epochs)

    resume = begin_epoch


TRAINS_AFTERWARDS = Need(
    "a backbone that trains (not --freeze-blocks all)",
    lambda options: not options.warm or options.freeze_blocks != net.ALL_BLOCKS,
)

# fmt: off
METHOD = Method(
    name="warmup",
    title="warm-up",
    flags=(Group("warm-up", (
        flag("--warm", 1, COUNT_OR_ZERO,
             "epochs in which only the heads and the criterion train", need=TRAINS_AFTERWARDS),
    )),),
    wanted=lambda options: options.warm > 0,
    routine=lambda options, labels: Warmup(options.warm),
)
