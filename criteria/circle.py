"""The circle loss as AMLoss' authors wrote it, which differs from the library's.

Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from criteria import checks
from criteria.base import Criterion, References, check_batch, in_float32, pair_masks


class CircleLoss(Criterion):
    """Circle loss over the pairs of a batch; s_ij = x_i·x_j, and the weights [·]₊ are constants.

        L = mean_i softplus(log Σ_j e^{p_ij} + log Σ_j e^{n_ij})
        p_ij = -γ [1 + m - s_ij]₊ (s_ij - 1 + m)  if i and j are of the same class, else 0
        n_ij =  γ [s_ij + m]₊ (s_ij - m)          if they are of different classes, else 0

    m ``m`` 0.4, γ ``gamma`` 80. As released, a pair that does not belong in a sum adds e⁰ to it;
    the library's `Circle` leaves it out. Embeddings (B, d) are not normalised here; with
    ``--l2-norm 1`` they come at unit length. ``terms`` stays empty. Raises ValueError for an empty
    batch.
    """

    needs_pairs = True
    no_memory = ""

    def __init__(self, m: float = 0.4, gamma: float = 80.0) -> None:
        super().__init__()
        checks.positive(gamma=gamma)
        self.m = m
        self.gamma = gamma

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels)
        others = embeddings if references is None else references.embeddings
        similarity = embeddings @ others.T
        positive, negative = pair_masks(labels, references)
        weights = similarity.detach()
        own = -(1 + self.m - weights).clamp_min(0) * (similarity - 1 + self.m)
        other = (weights + self.m).clamp_min(0) * (similarity - self.m)
        sums = [
            torch.where(mask, self.gamma * logits, 0.0).logsumexp(dim=1)
            for mask, logits in ((positive, own), (negative, other))
        ]
        return F.softplus(sums[0] + sums[1]).mean()
