"""Mixup of images (Zhang et al., 2018), as introspective learning uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flags import Group, flag, not_negative
from methods.base import Forward, Method, Routine

if TYPE_CHECKING:
    from dataset.loader import Batch


class Mixup(Routine):
    """A second forward pass in every step, of mixed images.

    λ ~ Beta(α, α), x' = λx + (1-λ)x[π], and the step's loss becomes
    L(x, y) + λ·L(x', y) + (1-λ)·L(x', y[π]).
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def forwards(self, batch: Batch, planned: list[Forward]) -> list[Forward]:
        """Adds a forward pass of the mixed images."""
        import torch

        import processes
        from criteria.base import on_host
        from devices import with_host_copy

        share = float(torch.distributions.Beta(self.alpha, self.alpha).sample())
        order = with_host_copy(torch.randperm(len(batch.labels)), batch.labels.device)
        (others,) = on_host(lambda labels, order: (labels[order],), batch.labels, order)
        partners = order[processes.shard(len(order))]
        images = processes.gather_rows(batch.images, len(order))
        mixed = torch.lerp(images[partners], batch.images, share)
        mixed = mixed.contiguous(memory_format=torch.channels_last)  # like the images
        targets = [(share, batch.labels), (1 - share, others)]
        return [*planned, Forward(mixed, targets)]


# fmt: off
METHOD = Method(
    name="mixup",
    title="mixup",
    flags=(Group("mixup of images", (
        flag("--mixup", 0.0, not_negative("ALPHA"),
             "mix images with Beta(ALPHA, ALPHA) shares in a second forward pass; 0 is off",
             shown="1 with --introspective, else 0"),
    )),),
    wanted=lambda options: options.mixup > 0,
    off={"mixup": 0.0},
    routine=lambda options, labels: Mixup(options.mixup),
)
