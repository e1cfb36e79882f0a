"""Losses of pytorch-metric-learning, mended where the library's fail or give NaN.

Goldberger et al., Neighbourhood Components Analysis, NeurIPS 2004. Movshovitz-Attias et al., No
Fuss Distance Metric Learning Using Proxies, ICCV 2017. Yu and Tao, Deep Metric Learning with Tuplet
Margin Loss, ICCV 2019. Ustinova and Lempitsky, Learning Deep Embeddings with Histogram Loss,
NeurIPS 2016. Only library.py imports this file.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
from torch import Tensor


class _ByLogarithms:
    """-log Σ_{j: y_j = y_i} softmax_j(-scale·D_i) of an image i, from the softmax's logarithms.

    The library sums the probabilities and then takes the logarithm. Where an image is far from its
    proxy and near another one, they are 0 in float32: it leaves such an image out, and just before
    that its gradient is NaN. Elsewhere the two are the same, up to rounding.
    """

    def nca_computation(
        self,
        query: Tensor,
        reference: Tensor,
        query_labels: Tensor,
        reference_labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
    ) -> dict[str, dict[str, Any]]:
        """What the library's reducers take: the losses of the images that have a ``reference``."""
        apart = query is not reference
        weights = convert_to_weights(indices_tuple, query_labels, query.dtype, using_ref=apart)
        table = self.distance(query, reference)
        logits = self.softmax_scale * (table if self.distance.is_inverted else -table)
        same = query_labels[:, None] == reference_labels
        if not apart:
            itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
            logits, same = logits.masked_fill(itself, -torch.inf), same & ~itself
        (found,) = same.any(dim=1).nonzero(as_tuple=True)
        if len(found) == 0:
            return self.zero_losses()
        shares = logits.log_softmax(dim=1)[found]
        own = shares.masked_fill(~same[found], -torch.inf).logsumexp(dim=1)
        of_each = {"losses": -own * weights[found], "indices": found, "reduction_type": "element"}
        return {"loss": of_each}


class NCALoss(_ByLogarithms, losses.NCALoss):
    """The library's, by logarithms; a batch without a pair gives 0.

    The library's memory takes it, and has each image find its own entry, at no distance.
    """

    no_memory = "its softmax over a whole memory would find an image's own entry, and nothing else"


class ProxyNCALoss(_ByLogarithms, losses.ProxyNCALoss):
    """The library's, by logarithms."""


EDGE = 1e-6
"""What a cosine stays below 1 by: 17 steps of float32."""


def _inside(cosines: Tensor) -> Tensor:
    """Cosines of which none is 1 or -1, nor by rounding beyond; those have no gradient."""
    return cosines.clamp(EDGE - 1, 1 - EDGE)


class TupletMarginLoss(losses.TupletMarginLoss):
    """The library's, whose angle of two equal embeddings is NaN by rounding."""

    def _compute_loss(
        self, pos_pairs: Tensor, neg_pairs: Tensor, indices_tuple: tuple[Tensor, ...]
    ) -> dict[str, dict[str, Any]]:
        if len(pos_pairs):  # where there are none, the library has a list of none
            pos_pairs = _inside(pos_pairs)
        return super()._compute_loss(pos_pairs, neg_pairs, indices_tuple)


class HistogramLoss(losses.HistogramLoss):
    """The library's, which has no place for a cosine of 1, that of two equal embeddings."""

    def compute_density(self, distances: Tensor) -> Tensor:
        """The histogram of some cosines, (bins + 1,)."""
        return super().compute_density(_inside(distances))
