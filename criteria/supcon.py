"""Supervised contrastive learning: Khosla et al., NeurIPS 2020."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from criteria import checks
from criteria.base import (
    Criterion,
    References,
    check_batch,
    in_float32,
    mean_where,
    pair_masks,
    unit_others,
    unit_rows,
    without_self,
)


class SupConLoss(Criterion):
    """SupCon: each image's softmax over the others, averaged over its positives.

        L = T/T₀ · mean_i -1/|P_i| Σ_{p∈P_i} log softmax_{j≠i}(x̂_i·x̂_j / T)_p

    T ``temperature`` 0.07, T₀ ``base_temperature`` 0.07. As released, the mean is over all images;
    one without a positive adds 0. The released loop also has two views of every image, here there
    is one. ``terms``: positive and negative, the mean cosine of pairs of the same class and of
    different classes. Raises ValueError for an empty batch.
    """

    needs_pairs = True
    no_memory = ""

    def __init__(self, temperature: float = 0.07, base_temperature: float = 0.07) -> None:
        super().__init__()
        checks.positive(temperature=temperature, base_temperature=base_temperature)
        self.temperature = temperature
        self.base_temperature = base_temperature

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = check_batch(embeddings, labels)
        unit = unit_rows(embeddings)
        cosines = unit @ unit_others(unit, references).T
        positive, negative = pair_masks(labels, references)
        logits = cosines / self.temperature
        # Not -∞: the gradient of a batch of one image would not be finite.
        logits = without_self(logits, references, -1e9)
        own = (F.log_softmax(logits, dim=1) * positive).sum(dim=1)
        losses = -own / positive.sum(dim=1).clamp_min(1)
        seen = cosines.detach()
        self._report(positive=mean_where(seen, positive), negative=mean_where(seen, negative))
        return self.temperature / self.base_temperature * losses.mean()
