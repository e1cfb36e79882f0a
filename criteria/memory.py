"""Cross-batch memory: a batch is compared with earlier batches too.

Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from criteria import checks
from criteria.base import Criterion, References, check_batch, in_float32
from criteria.objective import Term
from devices import with_host_copy

ON_THE_HOST = ("labels", "steps", "taken")
"""Buffers whose values a step reads in Python; on a GPU every read would wait for the device."""


class MemoryBank(Criterion):
    """XBM: a pair loss between the images of the batch and the last N = ``size`` embeddings.

        M ← the last N embeddings and labels, including this batch, without a gradient
        L = loss(anchors x_i of the batch, positives and negatives among M)

    An image is not paired with its own entry in M, but it is with entries of the same image from
    earlier epochs. The first ``start`` steps have no memory, only the batch. The memory is stored
    in buffers, so that checkpoints keep it. It is filled in training mode only, with embeddings as
    they are passed to the loss. Labels and counts stay in the host's memory on every device. How
    several processes of your own fill it alike is in docs/library.md.
    ``terms``: those of the loss, and remembered, the number of embeddings. Raises ValueError for a
    batch larger than N, and what the loss raises.
    """

    def __init__(self, loss: Criterion, size: int, embedding_size: int, start: int = 0) -> None:
        super().__init__()
        checks.positive(size=size)
        checks.not_negative(start=start)
        checks.whole(size=size, start=start)
        self.loss = loss
        self.size = int(size)
        self.start = int(start)
        self.needs_pairs = loss.needs_pairs
        self.register_buffer("embeddings", torch.zeros(self.size, embedding_size))
        self.register_buffer("labels", torch.zeros(self.size, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryBank:
        stay = {name: self._buffers[name] for name in ON_THE_HOST}
        super()._apply(function, recurse)
        self._buffers.update(stay)
        return self

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embeddings.shape[1])
        if len(labels) > self.size:
            raise ValueError(
                f"A memory of {self.size} embeddings cannot hold a batch of {len(labels)} images: "
                "make it larger."
            )
        references = self._remember(embeddings.detach(), labels) if self._count_step() else None
        loss = self.loss(embeddings, labels, references=references)
        count = 0 if references is None else len(references.labels)
        self._report(**self.loss.terms, remembered=torch.tensor(float(count)))
        return loss

    def _count_step(self) -> bool:
        """Count the step, and return whether it has a memory."""
        if not self.training:
            return False
        self.steps += 1
        return int(self.steps) > self.start

    def _remember(self, embeddings: Tensor, labels: Tensor) -> References:
        """Overwrite the oldest embeddings by this batch, and return all embeddings."""
        taken, host = int(self.taken), getattr(labels, "host", None)
        places = torch.arange(taken, taken + len(labels)) % self.size
        own = with_host_copy(places, labels.device)
        self.embeddings[own] = embeddings.to(self.embeddings.dtype)
        self.labels[places] = labels.cpu() if host is None else host
        self.taken += len(labels)
        full = min(taken + len(labels), self.size)
        known = with_host_copy(self.labels[:full], labels.device)
        return References(self.embeddings[:full], known, own)


def memory(
    name: str, metric: Term, l2_norm: bool, *, size: int, start: int = 0, embedding_size: int
) -> dict[str, Term]:
    """A pair loss with a memory; ValueError for a loss that cannot use one."""
    if reason := metric.criterion.no_memory:
        raise ValueError(
            f"The loss {name} cannot use a memory of earlier batches: {reason}; leave the memory "
            "bank out, or use another loss, such as ms."
        )
    bank = MemoryBank(metric.criterion, size, embedding_size, start)
    return {"metric": Term(bank, metric.inputs, metric.heads, metric.weight)}
